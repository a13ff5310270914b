"""Forks one experiment per request, so that many crashes import torch and verl once.

Reads a line of JSON (the overrides) from standard input, forks, prints the child's process id; the child runs the
experiment exactly as `python -m atropos_exp.run` does and writes to the file named by "log".
"""

import gc
import json
import os
import signal
import sys


def main() -> None:
    from atropos_exp.parts.trainer import platform_cpu

    platform_cpu.install()
    import torch.distributed.checkpoint.state_dict_saver  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2

    import atropos_exp.parts.trainer.verl_backend
    import atropos_exp.run

    list(transformers.AutoModelForImageTextToText._model_mapping.keys())  # verl does, which imports every configuration

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the killed
    gc.freeze()  # the forks need not walk what is there already
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(0)
        sys.argv = ["atropos_exp.run", *request["overrides"]]
        try:
            atropos_exp.run.main()
        finally:
            os._exit(1)


if __name__ == "__main__":
    main()
