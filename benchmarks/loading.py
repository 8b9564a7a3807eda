"""What importing and loading cost: ``python -m benchmarks.loading`` writes ``results/loading.json``.

Import: CPU seconds of fresh processes, ``import torch`` against ``import torch, qzoo`` (and with the zoo in use).
Loading: ResNet-50 with random weights, packed and master, against reading the float file and building torchvision's
model with ``assign=True``; with the size of the files, and the memory that loading takes on top of the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import qzoo
from benchmarks.measure import interleaved, machine
from qzoo.config import WEIGHTS

ROUNDS = 7
IMPORTS = {
    "import torch": "import torch",
    "import torch, qzoo": "import torch, qzoo",
    "import torch, qzoo; qzoo.create_model": "import torch, qzoo; qzoo.create_model",
}
_CPU_TIME = "\nimport time; print(time.process_time())"
_PEAK = r"""
import re, qzoo
peak = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
qzoo.load_pretrained({small!r})
before = peak()
model = qzoo.load_pretrained({folder!r})
print((peak() - before) / sum(t.nbytes for t in model.state_dict().values()))
"""


def run(code: str) -> float:
    """The number that a fresh interpreter prints."""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(output)


def import_times(rounds: int) -> dict[str, float]:
    """Median CPU seconds of each statement; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            samples[name].append(run(code + _CPU_TIME))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def save_all(folder: Path) -> None:
    """ResNet-50 in every form, with ranges from noise; and a small model."""
    noise = [torch.randn(1, 3, 64, 64)]
    for scheme in ("w8a8", "w4a8"):
        model = qzoo.create_model(f"resnet50-{scheme}")
        qzoo.calibrate(model, noise, progress=False)
        qzoo.save_pretrained(model, folder / scheme)
    qzoo.save_pretrained(model, folder / "master", form="master")
    qzoo.save_pretrained(qzoo.create_model("resnet50"), folder / "float")
    qzoo.save_pretrained(qzoo.create_model("resnet20"), folder / "small")


def loading_times(folder: Path, rounds: int) -> dict[str, float]:
    """Median CPU seconds of loading each form, and torchvision's model from the float file."""
    import torchvision
    from safetensors.torch import load_file

    def torchvision_model() -> None:
        state = load_file(folder / "float" / WEIGHTS)
        torchvision.models.resnet50().load_state_dict(state, assign=True)

    forms = {
        form: lambda form=form: qzoo.load_pretrained(folder / form) for form in ("w8a8", "w4a8", "master")
    }
    return interleaved({"torchvision": torchvision_model, **forms}, rounds=rounds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {**machine(), "import, CPU s": import_times(args.rounds)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_all(folder)
        times = loading_times(folder, args.rounds)
        results["loading ResNet-50, CPU s"] = times
        results["of torchvision's"] = {f: times[f] / times["torchvision"] for f in ("w8a8", "w4a8", "master")}
        size = (folder / "float" / WEIGHTS).stat().st_size
        forms = ("w8a8", "w4a8", "master")
        results["file size of float"] = {f: (folder / f / WEIGHTS).stat().st_size / size for f in forms}
        results["peak memory of the model's own size"] = {
            f: run(_PEAK.format(small=str(folder / "small"), folder=str(folder / f))) for f in forms
        }
    text = json.dumps(results, indent=2, ensure_ascii=False)
    print(text)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
