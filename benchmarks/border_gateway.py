"""The gateway of `border.py`."""

from benchmarks.border import serve_gateway

if __name__ == "__main__":
    serve_gateway()
