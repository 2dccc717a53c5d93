"""Our GGUF files beside those of llama-quantize with an importance matrix: same mix, same bytes, same text, judged by
llama.cpp's own `llama-perplexity --kl-divergence`.

Two models of which every width is a multiple of 256 (`gguf_models.py`): BabyLlama, whose texts it writes itself, and
SmolLM2-135M, rotated, since its weights were once Q4_1 and every tool finds that lattice; texts of WikiText-2. And
SmolLM2-135M as it is, where theirs is good already and ours must not be worse.
"""

from __future__ import annotations

# This file has the name of a package that our command imports; it does so in processes of its own, which never see it.
import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean

import gguf_models
import protocol
import torch
from record import write_results
from transformers import AutoTokenizer, LlamaForCausalLM

LIMITS = {"Q4_K_M": 0.6, "Q5_K_M": 0.6, "IQ4_XS": 0.6, "Q3_K_M": 0.5, "Q2_K": 0.5, "IQ3_M": 0.5, "IQ2_M": 0.5}
BENCHES = {"babyllama": "BabyLlama", "smollm2": "SmolLM2-135M rotated", "unrotated": "SmolLM2-135M"}
ROTATED = """
description: rotated and not compressed
transform:
  - {method: rotate, residual: true, values: true, seed: 0}
export: {format: dense}
"""
MEAN, TOP = re.compile(r"Mean\s+KLD:\s*(\S+) ±\s*(\S+)"), re.compile(r"Same top p:\s*(\S+) ±")
# llama-perplexity ends before its own log is written now and then.
TRIES = 10


@dataclass
class Bench:
    """One model in its folder. length: tokens of a window. calibration, test: windows of each text.

    most: of their KL that ours may have, where it is not that of `LIMITS`.
    """

    name: str
    folder: Path
    llama: Path
    length: int
    calibration: int
    test: int
    most: float | None = None
    proof: dict = field(default_factory=dict)

    @property
    def plain(self) -> Path:
        """The padded model as a GGUF file in float32."""
        return self.folder / "plain" / "model.gguf"

    def tool(self, name: str, *words: object) -> tuple[str, float]:
        """What one of llama.cpp's tools says, and its seconds of processor time."""
        return timed([str(self.llama / f"llama-{name}"), *map(str, words)])

    def outlierq(self, *words: object) -> float:
        """Run our command; its seconds of processor time."""
        return timed([sys.executable, "-m", "outlierq", *map(str, words)])[1]


def timed(words: list[str]) -> tuple[str, float]:
    """Output and seconds of processor time of a program; RuntimeError with its last words when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{said[-2000:]}")
    return said, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def babyllama(source: Path, folder: Path, asked: argparse.Namespace) -> Bench:
    """BabyLlama, padded, with texts that it wrote itself. source: a Hugging Face folder with tokenizer.model."""
    import sentencepiece

    bench = Bench(BENCHES["babyllama"], folder, asked.llama_cpp, 256, asked.calibration or 256, asked.windows)
    if not (folder / "padded").exists():
        tokens = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
        pieces = [tokens.id_to_piece(number) for number in range(tokens.get_piece_size())]
        gguf_models.with_bytes(source, pieces, folder / "bytes")
        model = LlamaForCausalLM.from_pretrained(folder / "bytes", dtype=torch.float32)
        for seed, name, count in ((1, "calibration", bench.calibration), (2, "test", bench.test)):
            text = gguf_models.written_by(model, (count + 8) * bench.length, seed, pieces)
            (folder / f"{name}.txt").write_text(text)
        gguf_models.save(gguf_models.padded(model), folder / "bytes", folder / "padded")
    bench.proof = proof(folder / "bytes", folder)
    return bench


def smollm2(source: Path, folder: Path, asked: argparse.Namespace) -> Bench:
    """SmolLM2, rotated, then padded, with the texts of WikiText-2."""
    bench = Bench(BENCHES["smollm2"], folder, asked.llama_cpp, 512, asked.calibration or 128, asked.windows)
    if not (folder / "padded").exists():
        (folder / "rotated.yaml").write_text(ROTATED)
        bench.outlierq("quantize", source, "-r", folder / "rotated.yaml", "-o", folder / "rotated", "-q")
        model = LlamaForCausalLM.from_pretrained(folder / "rotated", dtype=torch.float32)
        gguf_models.save(gguf_models.padded(model), folder / "rotated", folder / "padded")
        write_texts(folder, asked.data_dir)
    bench.proof = proof(folder / "rotated", folder)
    return bench


def unrotated(source: Path, folder: Path, asked: argparse.Namespace) -> Bench:
    """SmolLM2 as it is, of whose widths 256 divides few: both take other types there."""
    if not (folder / "padded").exists():
        shutil.copytree(source, folder / "padded")
        write_texts(folder, asked.data_dir)
    return Bench(BENCHES["unrotated"], folder, asked.llama_cpp, 512, asked.calibration or 128, asked.windows, most=1.0)


def write_texts(folder: Path, data: Path) -> None:
    """The texts of WikiText-2 to calibrate with and to judge by."""
    for name, text in (("calibration", protocol.CALIBRATION_TEXT), ("test", protocol.TEST_TEXT)):
        (folder / f"{name}.txt").write_bytes((data / text).read_bytes())


def proof(unpadded: Path, folder: Path) -> dict:
    """How far the logits of the padded model are from those of the one it was made of, on a window of the test text."""
    models = [LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (unpadded, folder / "padded")]
    ids = AutoTokenizer.from_pretrained(unpadded)((folder / "test.txt").read_text()[:2000]).input_ids[:200]
    return {
        "widths": [model.config.hidden_size for model in models] + [model.config.intermediate_size for model in models],
        "largest_difference_of_logits": gguf_models.difference(*models, torch.tensor([ids])),
    }


def prepare(bench: Bench) -> dict:
    """What all mixes share: the plain file and its logits, the importance matrix, our statistics; seconds of both.

    Made once for a folder and its numbers of windows.
    """
    note = bench.folder / f"prepared-{bench.calibration}-{bench.test}.json"
    if not note.exists():
        seconds = make_shared(bench)
        for other in bench.folder.glob("prepared-*.json"):
            other.unlink()
        note.write_text(json.dumps(seconds))
    return json.loads(note.read_text())


def make_shared(bench: Bench) -> dict:
    """What `prepare` promises, made anew."""
    text, folder, chunks, padded = bench.folder / "calibration.txt", bench.folder, bench.calibration, "padded"
    if not bench.plain.exists():
        bench.outlierq("quantize", folder / padded, "-r", "dense", "--format", "gguf", "-o", bench.plain.parent, "-q")
    shared = ("-m", bench.plain, "-c", bench.length, "-t", 1)
    _, theirs = bench.tool("imatrix", *shared, "-f", text, "-o", folder / "imatrix.gguf", "--chunks", chunks)
    shutil.rmtree(folder / "stats", ignore_errors=True)
    asked = ("--text", text, "--samples", chunks, "--sequence-length", bench.length, "-q")
    ours = bench.outlierq("calibrate", folder / padded, "-o", folder / "stats", *asked)
    base = ("--kl-divergence-base", folder / "base.kld", "--chunks", bench.test)
    bench.tool("perplexity", "--no-repack", *shared, "-f", folder / "test.txt", *base)
    return {"imatrix_cpu_seconds": theirs, "calibrate_cpu_seconds": ours}


def judged(bench: Bench, file: Path) -> dict:
    """Bytes, KL and top-1 agreement of a file, as llama-perplexity has them."""
    words = ("--no-repack", "-m", file, "-t", 1, "--kl-divergence-base", bench.folder / "base.kld", "--kl-divergence")
    for _ in range(TRIES):
        said, _ = bench.tool("perplexity", *words, "--chunks", bench.test)
        mean, top = MEAN.search(said), TOP.search(said)
        if mean and top:
            kl, error = map(float, mean.groups())
            return {"bytes": file.stat().st_size, "kl": kl, "kl_error": error, "top1": float(top[1]) / 100}
    raise RuntimeError(f"llama-perplexity says no KL of {file}:\n{said[-2000:]}")


def compared(bench: Bench, mix: str, settings: list[str], shared: dict) -> dict:
    """One mix by both."""
    theirs, ours = bench.folder / f"theirs-{mix}.gguf", bench.folder / f"ours-{mix}.gguf"
    matrix = ("--imatrix", bench.folder / "imatrix.gguf")
    _, their_seconds = bench.tool("quantize", *matrix, bench.plain, theirs, mix, 1)
    ours.unlink(missing_ok=True)
    words = ("-r", f"gguf-{mix.lower()}", "--stats", bench.folder / "stats", "-o", ours, "-q")
    chosen = [word for setting in settings for word in ("--set", setting)]
    our_seconds = bench.outlierq("quantize", bench.folder / "padded", *words, *chosen)
    rows = {"theirs": judged(bench, theirs), "ours": judged(bench, ours)}
    rows["theirs"]["cpu_seconds"], rows["ours"]["cpu_seconds"] = their_seconds, our_seconds
    whole = (our_seconds + shared["calibrate_cpu_seconds"]) / (their_seconds + shared["imatrix_cpu_seconds"])
    ratio = rows["ours"]["kl"] / rows["theirs"]["kl"]
    limit = bench.most or LIMITS[mix]
    print(f"{bench.name} {mix}: {rows['theirs']['kl']:.4f} {rows['ours']['kl']:.4f}, ratio {ratio:.3f}", flush=True)
    return {"mix": mix, **rows, "kl_ratio": ratio, "limit": limit, "met": ratio <= limit, "cpu_ratio": whole}


def main() -> None:
    """Make the models, run both tools, write the figures after each mix; other models and mixes stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama-quantize and the other tools")
    parser.add_argument("--babyllama", type=Path, help="Hugging Face folder of BabyLlama")
    parser.add_argument("--smollm2", type=Path, help="Hugging Face folder of SmolLM2-135M")
    parser.add_argument("--unrotated", type=Path, help="the same folder, to take the model as it is, too")
    parser.add_argument("--data-dir", type=Path, help="folder of WikiText-2, for SmolLM2")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--windows", type=int, default=32, help="test windows (default: 32)")
    parser.add_argument("--calibration", type=int, help="calibration windows (default: 256 or 128, as many tokens)")
    parser.add_argument("--mixes", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of our recipes")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the JSON file")
    asked = parser.parse_args()
    for name, prepared in (("babyllama", babyllama), ("smollm2", smollm2), ("unrotated", unrotated)):
        source, folder = getattr(asked, name), asked.work / name
        if source is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        bench = prepared(source, folder, asked)
        shared = prepare(bench)
        texts = {"calibration": f"{bench.calibration} x {bench.length}", "test": f"{bench.test} x {bench.length}"}
        about = {"model": bench.name, "tokens": texts, "padding": bench.proof, **shared}
        for mix in asked.mixes:
            write_row(asked.out, about, compared(bench, mix, asked.settings, shared), asked.settings)


def write_row(out: Path, about: dict, row: dict, settings: list[str]) -> None:
    """Put one mix of one model into the JSON file; what else is there stays; of it only what the same texts gave."""
    models = json.loads(out.read_text())["models"] if out.exists() else []
    earlier = next((each for each in models if each["model"] == about["model"]), {"tokens": None, "mixes": []})
    rows = [each for each in earlier["mixes"] if each["mix"] != row["mix"] and earlier["tokens"] == about["tokens"]]
    rows = sorted([*rows, row], key=lambda each: list(LIMITS).index(each["mix"]))
    mean = geometric_mean(each["kl_ratio"] for each in rows)
    others = [each for each in models if each["model"] != about["model"]]
    write_results(out, {"settings": settings, "models": [*others, {**about, "mean_kl_ratio": mean, "mixes": rows}]})


if __name__ == "__main__":
    main()
