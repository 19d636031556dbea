"""Golden outputs of `tests/fixtures`: how they came there.

python tests/goldens.py official DIR     copy the official fixtures of DIR, lists of keys packed
python tests/goldens.py write [NAME ...] answer again with the re-implementations of `tests/oracles` and store it
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def copy_official(folder: Path):
    "The authors' answers stay as they are; the lists of keys are packed to a tenth."
    from segkern.testing.fixtures import write_spec

    for spec in sorted(Path(folder).glob("*/spec.json")):
        to = FIXTURES / "official" / spec.parent.name
        to.mkdir(parents=True, exist_ok=True)
        write_spec(to, json.loads(spec.read_text()), packed=True)
        shutil.copyfile(spec.parent / "golden.npz", to / "golden.npz")
        print(to.name)


def write(names: list):
    "Outputs of the re-implementations, on a grid of points, and all that is needed to compare with them."
    import torch

    from oracles.zoo import ORACLES, ORIGIN
    from segkern.testing import save_fixture

    for name in names or ORACLES:
        oracle = ORACLES[name]
        with torch.no_grad():
            found = oracle.outputs()
        kept = {n: (found[n], stride) for n, stride in oracle.strides.items()}
        spec = oracle.spec()
        more = {k: v for k, v in spec.items() if k not in ("keys", "input")}
        save_fixture(
            FIXTURES / "reimplemented" / name,
            spec["keys"],
            spec["input"],
            kept,
            packed=True,
            origin=ORIGIN,
            model=oracle.model or name,
            options=oracle.options,
            **more,
        )
        print(name, {n: f"{t.std().item():.2g}" for n, (t, _) in kept.items()})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("official", "write"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args(arguments)
    if args.what == "official":
        copy_official(Path(args.names[0]))
    else:
        write(args.names)


if __name__ == "__main__":
    sys.path[:0] = [str(FIXTURES.parents[1]), str(FIXTURES.parent)]
    main()
