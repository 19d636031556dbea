"The families of ops that the gate takes apart: one process each, so that a crash of one says nothing about another."

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# family -> ops of the benchmark and modules that hold kernels; its tests are tests/test_kernels_FAMILY*.py
FAMILIES = {
    "head": (
        ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion", "upsample_dice"),
        (
            "labels_kernels",
            "mining",
            "ce_tiles",
            "quads",
            "ce_quads",
            "dice_tiles",
            "dice_quads",
        ),
    ),
    "sr_attention": (("sr_attention",), ("sr_attention_kernels",)),
    "strip": (
        ("strip_pool", "strip_attention"),
        ("strip_pool_kernels", "strip_attention_kernels"),
    ),
    "prototype": (
        ("prototypes", "cosine_logits", "class_sums"),
        ("prototypes_kernels", "cosine_kernels", "class_sums"),
    ),
    "affinity": (("affinity",), ("affinity_kernels",)),
    "msca": (("msca",), ("msca_kernels", "msca_gradients")),
    "squeeze_axial": (
        ("squeeze_axial", "axial_add", "axial_attention"),
        ("squeeze_axial", "axial_add"),
    ),
    "rca_gate": (("rca_gate",), ("rca_gate_kernels",)),
}


def ops_of(family, words=""):
    "The ops that a result concerns: those that `words` (the name of a test) names, else all of the family."
    ops = FAMILIES[family][0]
    if family != "strip":
        return ops
    return tuple(op for op in ops if op.removeprefix("strip_") in words) or ops


def test_files(family):
    "The files with the family's tests."
    return sorted((ROOT / "tests").glob(f"test_kernels_{family}*.py"))


def kernel_names(family):
    "The kernels of a family, read from the text of its modules."
    modules = [ROOT / "segkern" / "ops" / f"{m}.py" for m in FAMILIES[family][1]]
    text = "\n".join(m.read_text(encoding="utf-8") for m in modules if m.exists())
    return sorted(set(re.findall(r"^def (_\w+_kernel)\(", text, re.M)))


def predicted():
    "The comparisons of the gate, with what the review predicts for them."
    with open(ROOT / "data" / "bench" / "predicted.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))
