"""The process that writes trackio's database; `trackio.py` starts it. It ends by itself when its input ends."""

import os

from atropos_exp.parts.logger.remote_process import Seen, brief, connect, end_within, record


def main() -> None:
    """Record what arrives on standard input."""
    connected = connect()
    if connected is None:
        return
    settings, report = connected
    os.environ["TRACKIO_DIR"] = settings["folder"]  # read at import
    os.environ["HF_HUB_OFFLINE"] = "1"  # local only: nothing is uploaded anywhere
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        os.environ.pop(name, None)
    try:
        import trackio

        trackio.init(
            project=settings["project"], name=settings["name"], group=settings["group"], config=settings["config"],
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
    except Exception as error:  # the run goes on without it
        report(f"does not start, the run goes on without it: {brief(error)}", "warning")
        return
    report(f"to see the curves: {settings['show']}", "info")
    record(lambda step, values: trackio.log(values, step=step), trackio.Table, report, Seen(settings["seen"]))
    end_within(settings["finish_timeout"])
    trackio.finish()


if __name__ == "__main__":
    main()
