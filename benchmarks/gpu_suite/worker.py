"""Runs commands for the GPU suite, one after the other: a line of standard input for each, a JSON
list of its log, its module and its flags; the line of standard output after it has the exit status.

On a machine that has just started, importing torch and starting CUDA take longer than many parts.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import traceback


def main() -> None:
    """Run what is asked for until standard input ends, which the commands do not see; SIGINT ends a
    command, and not this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in orders:
        log, *words = json.loads(line)
        with open(log, "ab") as output:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
        status = status_of(words)
        sys.stdout.flush()
        forget(status)
        print(status, file=answers)


def status_of(words: list[str]) -> int:
    """Do as `python -m WORDS` does; returns its exit status."""
    sys.argv = words
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # Ctrl-C too: whoever asks decides what follows
        traceback.print_exc()
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 0


def forget(status: int) -> None:
    """Free what a command has left: networks, compiled code, CUDA graphs. Where an error of CUDA
    has made this process useless, end it with the command's status."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        except RuntimeError:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(status or 1)  # CUDA's own clean-up may hang


if __name__ == "__main__":
    main()
