"""How well the default calibration text carries over: KL on several domains, over calibration on each domain itself.

    python scripts/build_text.py --judged JUDGED
    python benchmarks/carry_over.py -m MODEL -t wiki.test.raw -t JUDGED/stories.txt -t stdlib ... -o results.json

Each text is a domain: its first three quarters are what calibration on the domain itself reads, windows of the last one
are what is judged on. `stdlib` is modules of this Python's standard library. Statistics are made once for a text.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import protocol
from decode import load_dense
from record import write_results
from torch import Tensor, nn

import outlierq

MODULES = [
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "csv",
    "datetime",
    "difflib",
    "doctest",
    "fractions",
    "inspect",
    "mailbox",
    "pathlib",
    "pdb",
    "pickle",
    "shutil",
    "smtplib",
    "statistics",
    "tarfile",
    "textwrap",
    "zipfile",
]
DEFAULT, FORMER = "mix", "embedded"


def domain_text(name: str) -> str:
    """The text of a domain: a file, or `stdlib`."""
    if name != "stdlib":
        return Path(name).read_text("utf-8")
    return "\n\n".join(Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text("utf-8") for module in MODULES)


def split(names: list[str], folder: Path) -> dict[str, tuple[Path, Path]]:
    """The files to calibrate and to judge on of each domain."""
    parts = {}
    for name in names:
        text, title = domain_text(name), Path(name).stem
        cut = text.index("\n", 3 * len(text) // 4)
        parts[title] = folder / f"{title}-own.txt", folder / f"{title}-judged.txt"
        for path, part in zip(parts[title], (text[:cut], text[cut:]), strict=True):
            path.write_text(part, "utf-8")
    return parts


def judged(model: nn.Module, reference: nn.Module, windows: dict[str, Tensor]) -> dict[str, float]:
    """KL per token on the windows [n, tokens] of each domain."""
    return {name: protocol.compare(reference, model, ids).kl for name, ids in windows.items()}


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """KL by recipe, calibration text and domain."""
    parts = split(arguments.text, folder)
    count, length = arguments.windows, arguments.length
    windows = {n: protocol.text_windows(arguments.model, judge, count, length) for n, (_, judge) in parts.items()}
    reference, kl = load_dense(arguments.model), {recipe: {} for recipe in arguments.recipe}
    own = {name: str(path) for name, (path, _) in parts.items()}
    for title, text in {DEFAULT: DEFAULT, FORMER: FORMER, **own}.items():
        stats = folder / f"stats-{title}"
        outlierq.calibrate(arguments.model, out=stats, text=text, samples=arguments.samples, sequence_length=length)
        for recipe in arguments.recipe:
            out = folder / f"{recipe}-{title}"
            outlierq.quantize(arguments.model, recipe, out=out, stats=stats, settings=arguments.set)
            asked = windows if title in (DEFAULT, FORMER) else {title: windows[title]}
            kl[recipe][title] = judged(load_dense(out), reference, asked)
            print(recipe, title, {name: round(value, 4) for name, value in kl[recipe][title].items()}, flush=True)
    return kl


def ratios(kl: dict[str, dict[str, float]], domains: list[str]) -> dict[str, float]:
    """Mean KL of the default text, and of the former one, over that of calibration on the judged domain."""
    own = sum(kl[domain][domain] for domain in domains)
    return {text: sum(kl[text].values()) / own for text in (DEFAULT, FORMER)}


def main() -> None:
    """Calibrate on every text, compress, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-t", "--text", action="append", required=True, help="a domain: a file, or stdlib (repeat)")
    parser.add_argument("-r", "--recipe", action="append", help="default: gptq-w4 and awq-w4")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipes")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--windows", type=int, default=4, help="windows that are judged on, of a domain (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of all windows (default: 512)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.recipe = arguments.recipe or ["gptq-w4", "awq-w4"]
    with tempfile.TemporaryDirectory() as folder:
        kl = measured(arguments, Path(folder))
    domains = [Path(name).stem for name in arguments.text]
    conditions = {
        "model": arguments.model.name,
        "calibration": f"{arguments.samples} x {arguments.length} tokens",
        "judged": f"{arguments.windows} x {arguments.length} tokens of a domain",
        "set": arguments.set,
    }
    summary = {recipe: ratios(kl[recipe], domains) for recipe in kl}
    write_results(arguments.output, {"conditions": conditions, "over calibration on the domain": summary, "kl": kl})
    print(summary)


if __name__ == "__main__":
    main()
