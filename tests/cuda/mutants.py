"""Plants one bug at a time in a copy of the CUDA kernels and asks the tests whether they see it.

    python tests/cuda/mutants.py [PATTERN]          the hand-made ones of mutants.txt
    python tests/cuda/mutants.py --random SEED N    N of all textual mutants of each file, drawn by a seed

Prints a table for kernels/README.md. The exit status is 1 if a hand-made one survives that is not marked.
The checked build is asked about those that the plain one lets pass, the tests of the PTX about what is left.
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import KERNELS, ROOT

TESTS = Path(__file__).parent
PYTEST = Path(sys.executable).with_name("pytest")
# What the first failure says, in this order, and what to call it.
KINDS = [
    ("race in", "race"), ("under way", "copy in flight"), ("never written", "unwritten"),
    ("divergent|returned|deadlock", "divergence"), ("misaligned", "alignment"), ("bank conflicts", "bank conflicts"),
    ("outside|cross the end|only read|beyond its", "bounds"), ("counters", "counters"), ("other bits", "order"),
    ("wrong, first at", "values"), ("cudaFuncSetAttribute|bad grid", "launch"), ("BuildError", "does not compile"),
    ("refused|FASTLORA_|sentence|fit together|too small|beyond 2|is null|misaligned$", "refusal"),
    ("worse|operands|assert", "assertion"),
]  # fmt: skip
SWAPS = [
    (r" < ", " <= "), (r" <= ", " < "), (r" >= ", " > "), (r" > ", " >= "), (r" \+ ", " - "), (r" - ", " + "),
    (r" \* ", " + "), (r" / ", " % "), (r" % ", " / "), (r" && ", " || "), (r" \|\| ", " && "), (r" == ", " != "),
    (r"\b16\b", "8"), (r"\b8\b", "16"), (r"\b32\b", "16"), (r"\b2\b", "1"), (r"\b1\b", "2"), (r"\b0\b", "1"),
    (r"\b4\b", "2"), (r"\bp\.m\b", "p.k"), (r"\bp\.n\b", "p.k"), (r"\bp\.k\b", "p.m"), (r"\branks\b", "columns"),
    (r"\brow\b", "column"), (r"\bcolumn\b", "row"), (r"\bbase\b", "ranks"), (r"\? (\w+) : (\w+)", None),
]  # fmt: skip


def hand_made():
    """(file, what, old, new, why it may survive or "") of mutants.txt."""
    for block in (TESTS / "mutants.txt").read_text().split("\n\n")[1:]:
        title, *lines = block.strip("\n").split("\n")
        file, what, reason = re.fullmatch(r"([\w.]+): (.*?)(?: \(survives: (.*)\))?", title).groups()
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        yield file, what, old, new, reason or ""


def run(tests, kernels, *choice):
    """None if the tests pass on these kernels, else what kind of failure came first."""
    command = [PYTEST, "-x", "-q", "-p", "no:cacheprovider", *(TESTS / t for t in tests), *choice]
    environment = {**os.environ, "FASTLORA_CUDA_KERNELS": str(kernels)}

    def limit():
        # of its own time, not of the clock's: others may use the machine
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=limit)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hangs"
    if done.returncode in (0, 5):
        return None
    said = "\n".join(re.findall(r"^E .*", done.stdout, re.M)) or done.stdout + done.stderr
    if done.returncode < 0:
        return "crash"
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, said)), None)
    if not kind:
        raise RuntimeError(f"neither a test nor the mutant failed:\n{said[-3000:]}")
    return kind


def judge(file, old, new):
    """(which part of the tests sees the mutant or None, how)."""
    stems = [Path(file).stem] if file.endswith(".cu") else [source.stem for source in sorted(KERNELS.glob("*.cu"))]
    tests = [f"test_{stem}{more}.py" for stem in stems for more in ("", "_dora")]
    tests = [name for name in tests if (TESTS / name).exists()]
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(KERNELS, kernels)
        text = (kernels / file).read_text()
        assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
        (kernels / file).write_text(text.replace(old, new))
        for part, files, choice in (
            ("plain", tests, ["-k", "not checked"]),
            ("checked", tests, ["-k", "checked"]),
            ("ptx", ["test_ptx.py"], ["-k", "mma or ldmatrix or copies or chunks"]),
        ):
            kind = run(files, kernels, *choice)
            if kind:
                return part, kind
    return None, ""


def textual(file):
    """Every (what, old line, new line) of a file: one operator, number or name exchanged, or a call left out."""
    text = (KERNELS / file).read_text()
    host = text.split("#endif")[-1]  # a wrapper's PTX is another matter: mutants.txt has those
    for line in host.splitlines(keepends=True):
        code = line.split("//")[0]
        if text.count(line) != 1 or not code.strip() or code.lstrip().startswith(("#", "template", "using", "}")):
            continue
        for pattern, new in SWAPS:
            for m in re.finditer(pattern, code):
                changed = f"? {m[2]} : {m[1]}" if new is None else new
                around = code[max(0, m.start() - 25) : m.end() + 20].strip()
                yield f"`{around}`: {changed.strip()}", line, line[: m.start()] + changed + line[m.end() :]
        if re.match(r"\s+[\w.]+(<.*>)?\(.*\);\s*$", code):
            yield f"left out: `{code.strip()[:60]}`", line, "\n"


def drawn(seed, count):
    rng = random.Random(seed)
    for file in sorted(p.name for p in KERNELS.glob("*.cu*")):
        for what, old, new in rng.sample(sorted(textual(file)), count):
            yield file, what, old, new, ""


def main(arguments):
    at_random = arguments[:1] == ["--random"]
    pattern = "" if at_random else "".join(arguments)
    chosen = (
        list(drawn(*map(int, arguments[1:3])))
        if at_random
        else [m for m in hand_made() if re.search(pattern, f"{m[0]} {m[1]}")]
    )
    print("| file | planted | found by | as |\n|---|---|---|---|")
    survivors = 0
    for file, what, old, new, reason in chosen:
        part, kind = judge(file, old, new)
        survivors += not part and not reason
        found = part or (f"nobody: {reason}" if reason else "**nobody**")
        print(f"| {file} | {what.replace('|', chr(92) + '|')} | {found} | {kind} |", flush=True)
    print(f"\n{len(chosen)} mutants, {survivors} survive for no known reason")
    return 0 if at_random else survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
