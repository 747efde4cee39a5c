"""What the examples print while they work."""

import sys


def say(headline):
    print(f"\n{headline}", flush=True)


def progress(step, steps, note, lines=3):
    """A bar on one line of a terminal; in a log, that many lines in all."""
    done = 30 * step // steps
    line = f"   [{'#' * done}{'.' * (30 - done)}] {step:3}/{steps}  {note}"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if step == steps else "", flush=True)
    elif step * lines // steps > (step - 1) * lines // steps:
        print(line, flush=True)
