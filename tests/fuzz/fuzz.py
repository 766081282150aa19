# SPDX-License-Identifier: Apache-2.0
"""Fuzz a target of fuzzed.py: `python tests/fuzz/fuzz.py checkpoint FOLDER... [-max_total_time=60]`; see `make fuzz`.

Inputs that find something new are saved in the first folder. Options are libFuzzer's. This needs `pip install atheris`,
and runs under atheris's AddressSanitizer, which checks how torch's and NumPy's code uses memory.
"""

import json
import os
import random
import sys
from pathlib import Path

import atheris

if __name__ == "__main__" and "LD_PRELOAD" not in os.environ:
    library = Path(atheris.__file__).parent.parent / "asan_with_fuzzer.so"
    os.environ |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"  # Python keeps memory at its end
    os.execv(sys.executable, [sys.executable, *sys.argv])

MODULES = [
    *(f"distributed_trainer.checkpoint.{name}" for name in ("format", "schema", "safetensors", "state", "reader")),
    *("distributed_trainer.data.position", "distributed_trainer.data.rng", "distributed_trainer.cli.hostfile"),
    *("distributed_trainer.cli.preflight", "distributed_trainer.launch.host_facts"),
    *("distributed_trainer.launch.job_record", "distributed_trainer.backend.version_check"),
]
with atheris.instrument_imports(include=MODULES):
    import fuzzed
assert set(MODULES) <= set(sys.modules), "a module that is to be watched was moved"

ODD = [None, True, -1, 0, 1, 623, 625, 1 << 31, 1 << 62, 1 << 64, 10**80, -0.0, float("nan"), float("inf"), "", "../x"]
ODD += ["\0", "F32", "BF16", "$tensor", [], [[]], {}, {"$tensor": "optimizer.a"}, {"$tuple": 1}, {"$dict": [[[], 1]]}]
ODD += [{"$counter": [["a", 1]]}, {"$bytes": "!"}, {"$numpy": "model.weight"}, {"$odd": []}]
DEEP = "[" * 700 + "]" * 700


def places_in(value):
    """Yield each container in a value of JSON with each of its keys."""
    stack = [value]
    while stack:
        one = stack.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, inner in items:
            yield one, key
            stack.append(inner)


def change_json(text, chooser):
    """Replace one value in a text of JSON."""
    value = json.loads(text)
    places = list(places_in(value))
    one, key = chooser.choice(places)
    other, from_key = chooser.choice(places)
    kind = chooser.randrange(6)
    if kind == 0:
        del one[key]
    elif kind == 1:
        one[key] = json.loads(json.dumps(other[from_key]))
    elif kind == 2 and type(one[key]) is int:
        one[key] += chooser.choice([-1, 1, 4, 8, -8])
    elif kind == 3 and isinstance(one, dict):
        one[chooser.choice(["model", "$tuple", "model.weight", "rank-00001.json"])] = one[key]
    elif kind == 4 and chooser.random() < 0.1:
        one[key] = "@deep"
    else:
        one[key] = chooser.choice(ODD)
    return json.dumps(value).replace('"@deep"', DEEP).encode()


def change_checkpoint(data, max_size, seed):
    """Mutate one file of a checkpoint by its format, or any bytes; a custom mutator of libFuzzer."""
    chooser = random.Random(seed)
    parts = data.split(fuzzed.SEPARATOR)
    number = chooser.randrange(len(parts))
    kind = chooser.random()
    try:
        if kind < 0.3 or len(parts) < 2:
            return atheris.Mutate(data, max_size)
        if kind < 0.35:
            parts[0] = chooser.choice([b"0", b"1", b"2", b"3"])
        elif kind < 0.4:
            other = chooser.randrange(len(parts))
            parts[number], parts[other] = parts[other], parts[number]
        elif kind < 0.45:
            parts[number] = parts[number][: chooser.randrange(len(parts[number]) + 1)]
        elif number in (3, 5):
            length = int.from_bytes(parts[number][:8], "little")
            header = change_json(parts[number][8 : 8 + length], chooser)
            parts[number] = len(header).to_bytes(8, "little") + header + parts[number][8 + length :]
        else:
            parts[number] = change_json(parts[number], chooser)
    except (ValueError, LookupError, RecursionError):  # earlier changes have broken the format
        return atheris.Mutate(data, max_size)
    changed = fuzzed.SEPARATOR.join(parts)
    return changed if len(changed) <= max_size else data


def main():
    """Run until the time is over, or a bug is found."""
    name, folder = sys.argv[1:3]
    target, make_seeds = fuzzed.TARGETS[name]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(make_seeds()):
        (Path(folder) / f"seed-{number}").write_bytes(seed)
    limits = ["-timeout=60", "-rss_limit_mb=3000", "-malloc_limit_mb=300", "-max_len=8000"]
    arguments = [sys.argv[0], *limits, *sys.argv[2:]]
    mutators = {"custom_mutator": change_checkpoint} if name == "checkpoint" else {}
    atheris.Setup(arguments, target, **mutators)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
