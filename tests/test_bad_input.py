"""Bad input as a user sees it: an exit code, a message with what, where and what to try, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SMALL = ("--set", "calibration.samples=6", "--set", "calibration.sequence_length=32")


@pytest.fixture
def refused(outlierq, tmp_path):
    """Run a command that must fail; its message. No traceback, and nothing under the final name."""

    def call(*words: object, code: int = 1) -> str:
        out = tmp_path / "out"
        answer = outlierq(*words)
        assert answer.code == code, answer
        assert "Traceback" not in answer.err and answer.out == ""
        assert not out.exists()
        # The plan may stand before the message; what matters is the end.
        return answer.err[answer.err.index("error: ") :]

    call.quantize = lambda source, *words, **options: call(
        "quantize", source, "-o", tmp_path / "out", "-q", *(words or ("-r", "rtn-w4")), **options
    )
    return call


def edit_shard(folder: Path, change) -> None:
    """Rewrite the one weight file with changed tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sharded(folder: Path) -> Path:
    """The one weight file as two with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: shard for shard, members in halves.items() for name in members}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


class TestSource:
    """The checkpoint."""

    def test_a_path_that_does_not_exist_gets_the_nearest_name(self, refused, tiny_llama):
        said = refused.quantize(f"{tiny_llama}x")
        assert "does not exist" in said and "did you mean" in said and tiny_llama.name in said

    def test_a_missing_shard_is_named(self, refused, llama_copy, tmp_path):
        sharded(llama_copy)
        (llama_copy / "model-00002-of-00002.safetensors").unlink()
        said = refused.quantize(llama_copy)
        assert "names model-00002-of-00002.safetensors, which is not in" in said and "hint: download" in said
        assert not (tmp_path / "out.partial").exists()

    def test_a_truncated_shard_is_named(self, refused, llama_copy):
        shard = llama_copy / "model.safetensors"
        os.truncate(shard, shard.stat().st_size - 100)
        said = refused.quantize(llama_copy)
        assert "model.safetensors" in said and "bytes" in said

    def test_an_index_that_leads_out_of_the_folder_is_refused(self, refused, llama_copy):
        index = sharded(llama_copy)
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
        index.write_text(json.dumps(content))
        assert "lies outside of the checkpoint folder" in refused.quantize(llama_copy)

    def test_a_tensor_that_the_model_needs_and_nobody_has_is_named(self, refused, llama_copy):
        edit_shard(llama_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        assert "model.layers.1.mlp.up_proj.weight" in refused.quantize(llama_copy)

    def test_a_tensor_of_another_shape_is_named(self, refused, llama_copy):
        edit_shard(llama_copy, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(95, 64)}))
        said = refused.quantize(llama_copy)
        assert "model.layers.1.mlp.up_proj" in said and "95" in said and "96" in said

    @pytest.mark.parametrize("recipe", ["rtn-w4", "gptq-w4", "awq-gptq-w4"])
    @pytest.mark.parametrize(
        "name", ["model.layers.1.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight"]
    )
    def test_a_nan_in_a_weight_is_named(self, refused, llama_copy, recipe, name):
        edit_shard(llama_copy, lambda tensors: tensors[name].view(-1)[3:5].fill_(float("nan")))
        settings = SMALL if recipe != "rtn-w4" else ()
        said = refused.quantize(llama_copy, "-r", recipe, *settings)
        assert name in said and "NaN" in said

    def test_a_nan_in_an_embedding_is_named(self, refused, llama_copy):
        edit_shard(llama_copy, lambda tensors: tensors["model.embed_tokens.weight"][7].fill_(float("inf")))
        assert "model.embed_tokens.weight holds" in refused.quantize(llama_copy)

    def test_weights_of_integers_are_refused(self, refused, llama_copy):
        name = "model.layers.0.mlp.up_proj.weight"
        edit_shard(llama_copy, lambda tensors: tensors.update({name: torch.ones(96, 64, dtype=torch.int32)}))
        said = refused.quantize(llama_copy)
        assert name in said and "I32" in said

    def test_a_pickle_is_refused(self, refused, llama_copy, tmp_path):
        (llama_copy / "model.safetensors").unlink()
        (llama_copy / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        assert "is a pickle" in refused.quantize(llama_copy)
        assert "is a pickle" in refused.quantize(llama_copy / "pytorch_model.bin")

    def test_a_source_of_an_unknown_compression_is_refused(self, refused, llama_copy):
        edit_json(llama_copy / "config.json", quantization_config={"quant_method": "zip"})
        said = refused.quantize(llama_copy)
        assert "compressed with zip, which is not decoded here" in said and "start from the original" in said

    def test_a_config_of_an_unknown_architecture_is_refused(self, refused, llama_copy):
        edit_json(llama_copy / "config.json", model_type="flamingo9000", architectures=["Flamingo"])
        assert "flamingo9000" in refused.quantize(llama_copy)

    def test_a_config_that_is_not_json_is_refused(self, refused, llama_copy):
        (llama_copy / "config.json").write_text("{")
        assert "config.json is not JSON" in refused.quantize(llama_copy)

    @pytest.mark.parametrize("change", [{"hidden_size": -64}, {"num_attention_heads": 0}, {"hidden_act": "sparkle"}])
    def test_a_config_with_impossible_values_is_refused(self, refused, llama_copy, change):
        edit_json(llama_copy / "config.json", **change)
        assert "error: " in refused.quantize(llama_copy)

    def test_a_missing_tokenizer_is_said_when_it_is_needed(self, refused, outlierq, llama_copy, tmp_path):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (llama_copy / name).unlink()
        assert "the tokenizer of" in refused.quantize(llama_copy, "-r", "gptq-w4", *SMALL)
        assert not (tmp_path / "out.partial").exists()
        assert outlierq("quantize", llama_copy, "-r", "rtn-w4", "-o", tmp_path / "out", "-q").code == 0

    def test_a_hub_id_without_a_network_is_explained(self, refused, monkeypatch, tmp_path):
        import huggingface_hub
        from huggingface_hub import errors

        def unreachable(*_, **__):
            raise errors.LocalEntryNotFoundError("no network")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
        said = refused.quantize("nobody/nothing")
        assert "not in the cache and the Hub cannot be reached" in said and "HF_HUB_OFFLINE=1" in said

    def test_a_gguf_file_that_is_not_one_is_refused(self, refused, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
        assert "error: " in refused.quantize(tmp_path / "model.gguf")


class TestRecipe:
    """The YAML file and --set."""

    def check(self, refused, tmp_path, text: str, *words: object) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return refused("recipes", "check", tmp_path / "mine.yaml", *words)

    def test_an_unknown_key_gets_its_line_and_the_nearest_name(self, refused, tmp_path):
        said = self.check(refused, tmp_path, "quantize:\n  method: rtn\n  bit: 4\n")
        assert "line 3, quantize.bit: unknown key; did you mean 'bits'?" in said

    def test_an_unknown_option_of_a_method_gets_its_line_and_the_nearest_name(self, refused, tmp_path):
        said = self.check(refused, tmp_path, "quantize:\n  method: rtn\n  scale_serch: mse\n")
        assert "line 3, quantize.scale_serch: unknown key; did you mean 'scale_search'?" in said

    def test_a_wrong_type_gets_its_line_and_the_value(self, refused, tmp_path):
        said = self.check(refused, tmp_path, "quantize:\n  method: rtn\n  bits: many\n")
        assert "line 3, quantize.bits:" in said and "'many'" in said

    def test_all_faults_are_reported_at_once(self, refused, tmp_path):
        text = "calibration:\n  samples: 0\n  txt: embedded\n"
        text += "quantize:\n  method: gptk\n  bits: 9\nexport:\n  format: onnx\n"
        said = self.check(refused, tmp_path, text)
        assert "5 faults" in said
        for part in ("line 2, calibration.samples", "line 3, calibration.txt", "line 5, quantize.method", "'gptq'"):
            assert part in said
        assert "line 6, quantize.bits" in said and "line 8, export.format" in said

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("quantize: {method: gptq}\n", "calibration: missing, but the methods need hessian"),
            ("calibration: {}\ntransform: [{method: awq}]\nexport: {format: dense}\n", "nothing to transform for"),
            ("export: {format: compressed-tensors}\n", "only `dense` can be written"),
            (
                "calibration: {skip_first_tokens: 8, sequence_length: 8}\nquantize: {method: gptq}\n",
                "leaves nothing of a sequence_length of 8",
            ),
        ],
    )
    def test_an_impossible_combination_is_explained(self, refused, tmp_path, text, message):
        assert message in self.check(refused, tmp_path, text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("quantize: [", "not valid YAML at line"),
            ("- a\n- b\n", "a recipe is a mapping of keys to values, this is a list"),
            ("", "a recipe is a mapping of keys to values, this is a NoneType"),
            ("quantize:\n  method: rtn\n  bits: 4\n  bits: 8\n", "line 4, quantize.bits: given twice, first in line 3"),
            ("quantize: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
            ("quantize: rtn\n", "quantize"),
            ("quantize: {method: rtn, group_size: 0}\n", "positive number of columns"),
            ("quantize: {method: rtn}\nexport: {max_shard_size: big}\n", "'big' is not a size"),
            ("calibration: {text: []}\nquantize: {method: gptq}\n", "calibration.text"),
        ],
    )
    def test_other_faults_of_a_file_are_explained(self, refused, tmp_path, text, message):
        assert message in self.check(refused, tmp_path, text)

    def test_a_file_that_is_not_text_is_refused(self, refused, tmp_path):
        (tmp_path / "mine.yaml").write_bytes(b"quantize: \xff\xfe\n")
        assert "not UTF-8 text" in refused("recipes", "check", tmp_path / "mine.yaml")

    def test_an_unknown_name_gets_the_nearest_shipped_one(self, refused, tiny_llama):
        said = refused.quantize(tiny_llama, "-r", "awq-gptq-w5")
        assert "no recipe file 'awq-gptq-w5'" in said and "did you mean 'awq-gptq-w4'?" in said

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("quantize.bits=99", "--set quantize.bits: "),
            ("quantize.bots=4", "did you mean 'bits'?"),
            ("quantize.bits", "not of the form key=value"),
            ("=4", "not of the form key=value"),
            ("quantize.bits=[", "is not a YAML value"),
            ("quantize.bits.deep=4", "there is no 'deep' in 4"),
            ("quantize.overrides.0.bits=4", "--set quantize.overrides: Input should be a valid"),
            ("transform.1.method=awq", "there is no '1' in a list of 1"),
            ("samples=4", "unknown key"),
        ],
    )
    def test_a_bad_set_is_explained(self, refused, setting, message):
        assert message in refused("recipes", "check", "awq-gptq-w4", "--set", setting)


class TestOutput:
    """The output folder and the disk."""

    def test_an_existing_output_is_not_overwritten(self, outlierq, tiny_llama, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", out, "-q")
        assert answer.code == 1 and "exists already" in answer.err and "nothing is overwritten" in answer.err
        assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    def test_an_output_that_is_a_file_is_refused(self, outlierq, tiny_llama, tmp_path):
        (tmp_path / "out").write_text("mine")
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "-q")
        assert answer.code == 1 and "exists already" in answer.err

    def test_an_output_below_a_file_is_refused(self, outlierq, tiny_llama, tmp_path):
        (tmp_path / "file").write_text("mine")
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "file" / "out", "-q")
        assert answer.code == 1 and "error: " in answer.err and "Traceback" not in answer.err

    @pytest.mark.parametrize("function", ["posix_fallocate", "pwrite", "fdatasync"])
    def test_a_full_disk_is_explained(self, refused, tiny_llama, monkeypatch, function):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, function, full)
        said = refused.quantize(tiny_llama)
        assert "no space on the disk for model.safetensors" in said and "free some space" in said

    def test_a_disk_that_was_full_is_no_obstacle_later(self, refused, outlierq, tiny_llama, monkeypatch, tmp_path):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", full)
            refused.quantize(tiny_llama)
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "-q")
        assert answer.code == 0 and (tmp_path / "out" / "outlierq.json").is_file()

    def test_a_read_only_place_is_explained(self, refused, tiny_llama, monkeypatch):
        def forbidden(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", forbidden)
        assert "cannot be written: Permission denied" in refused.quantize(tiny_llama)


class TestText:
    """Calibration and evaluation text."""

    def test_a_calibration_text_that_is_too_short_says_what_would_fit(self, refused, tiny_llama, tmp_path):
        (tmp_path / "short.txt").write_text("The sea is calm tonight. " * 4)
        said = refused.quantize(tiny_llama, "-r", "gptq-w4", *SMALL, "--set", f"calibration.text={tmp_path}/short.txt")
        assert "100 tokens; 6 samples of 32 tokens need 192" in said and "samples: 3" in said
        assert not (tmp_path / "out.partial").exists()

    def test_a_calibration_text_that_is_not_there_is_named(self, refused, tiny_llama, tmp_path):
        said = refused("calibrate", tiny_llama, "-o", tmp_path / "out", "--text", tmp_path / "none.txt")
        assert "none.txt" in said and "No such file" in said

    def test_an_evaluation_text_that_is_not_there_is_named(self, refused, tiny_llama, tmp_path):
        assert "none.txt cannot be read" in refused("eval", tiny_llama, "--text", tmp_path / "none.txt", "-q")

    @pytest.mark.parametrize("content", [b"too short", b"", b"\xff\xfe\x00"])
    def test_an_evaluation_text_that_cannot_be_used_is_explained(self, refused, tiny_llama, tmp_path, content):
        (tmp_path / "text.txt").write_bytes(content)
        said = refused("eval", tiny_llama, "--text", tmp_path / "text.txt", "-q", "--device", "cpu")
        assert "text" in said

    def test_an_unknown_task_is_named(self, refused, tiny_llama):
        words = ("--windows", "1", "--window-length", "16", "--device", "cpu", "-q")
        assert "wikitexx" in refused("eval", tiny_llama, "--tasks", "wikitexx", *words)

    def test_an_evaluation_text_of_chats_says_what_it_must_be(self, refused, tiny_llama, tmp_path):
        (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
        said = refused("eval", tiny_llama, "--text", tmp_path / "chats.jsonl", "-q")
        assert "it has messages" in said and "rows with a column `text`" in said

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--min-task", "wikitexx:1"), "lm-eval knows no task `wikitexx`"),
            (("--min-task", "wikitext:1", "--data-dir", "absent"), "absent holds no data files"),
            (("--min-task", "wikitext:1", "--data-dir", "data"), "data has no data for 1 tasks: wikitext"),
            (("--max-kl", "1", "--set", "gate.text=absent.txt"), "absent.txt cannot be read"),
            (("--max-kl", "1", "--set", "gate.window_length=1000"), "windows of 1000 tokens exceed"),
            (("--max-kl", "1", "--set", "gate.windows=100000"), "100000 windows of 512 need"),
            (("--max-kl", "1", "--junit", "data"), "data cannot be written: it is a folder"),
        ],
    )
    def test_what_a_gate_names_is_looked_for_before_anything_is_quantized(
        self, refused, tiny_llama, tmp_path, monkeypatch, words, said
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "other.jsonl").write_text("{}\n")
        monkeypatch.setattr("outlierq.pipeline.quantize.quantize", None)
        assert said in refused.quantize(tiny_llama, "-r", "rtn-w4", "--device", "cpu", *words)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("eval", "--tasks", "wikitexx"), "lm-eval knows no task `wikitexx`"),
            (("eval", "--windows", "100000"), "100000 windows of 512 need"),
            (("eval", "--window-length", "513"), "windows of 513 tokens exceed the model's 512 positions"),
            (("eval", "-o", "file/results.json"), "results.json cannot be written: "),
            (("detect", "-o", "file/report"), "report.json cannot be written: "),
        ],
    )
    def test_what_a_measurement_names_is_looked_for_before_a_model_is_loaded(
        self, refused, tiny_llama, tmp_path, monkeypatch, words, said
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("outlierq.load.load_model", None)
        monkeypatch.setattr("outlierq.pipeline.detect.detect", None)
        assert said in refused(words[0], tiny_llama, *words[1:], "--device", "cpu", "-q")


class TestOptions:
    """Words on the command line."""

    def test_statistics_of_another_model_are_refused(self, refused, outlierq, tiny_llama, untied_llama, tmp_path):
        stats = tmp_path / "stats"
        assert (
            outlierq("calibrate", untied_llama, "-o", stats, *("--samples", 4, "--sequence-length", 16), "-q").code == 0
        )
        said = refused.quantize(tiny_llama, "-r", "gptq-w4", "--stats", stats)
        assert "statistics of another model" in said and "outlierq calibrate" in said
        said = refused.quantize(tiny_llama, "-r", "gptq-w4", "--stats", tmp_path / "none")
        assert "holds no statistics" in said

    def test_an_output_that_holds_another_run_is_refused(self, refused, tiny_llama, tmp_path, monkeypatch):
        from outlierq.pipeline import quantize

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(quantize, "finish", full)
            assert "No space left on device" in refused.quantize(tiny_llama)
        said = refused.quantize(tiny_llama, "-r", "rtn-w8")
        assert "unfinished run with another recipe (3 units done)" in said and "--restart" in said

    def test_cuda_without_a_gpu_is_refused(self, refused, tiny_llama, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        said = refused.quantize(tiny_llama, "-r", "rtn-w4", "--device", "cuda")
        assert "torch finds no CUDA device" in said and "--device cpu" in said
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize(
        "words",
        [
            ("quantize", "MODEL"),
            ("quantize", "MODEL", "-o", "out", "--bits", "4"),
            ("quantize", "MODEL", "-o", "out", "--device", "tpu"),
            ("eval", "MODEL", "--max-kl", "0.1"),
            ("eval", "MODEL", "--dtype", "float8"),
            ("eval", "MODEL", "--windows", "few"),
            ("eval", "MODEL", "--windows", "-3"),
            ("eval", "MODEL", "--window-length", "1"),
            ("eval", "MODEL", "--tasks", "wikitext", "--limit", "0"),
            ("eval", "MODEL", "--tasks", "wikitext", "--batch-size", "0"),
            ("compare", "MODEL", "MODEL", "--quality", "--windows", "-1"),
            ("compare", "MODEL"),
            ("compress", "MODEL"),
            ("recipes", "lists"),
        ],
    )
    def test_wrong_usage_exits_with_2(self, refused, tiny_llama, words, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        said = refused(*(str(tiny_llama) if word == "MODEL" else word for word in words), code=2)
        assert "error: " in said and "usage: " in said

    def test_a_revision_of_a_local_folder_is_refused(self, refused, tiny_llama):
        assert "makes sense for a Hub id only" in refused.quantize(tiny_llama, "-r", "rtn-w4", "--revision", "main")


@pytest.mark.parametrize("command", ["plan", "quantize", "inspect", "verify", "eval"])
def test_a_quantization_config_that_is_a_text_is_refused_in_words(command, llama_copy, outlierq, tmp_path):
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    words = (
        ("-r", "rtn-w4", "-o", tmp_path / "out")
        if command == "quantize"
        else ("-r", "rtn-w4")
        if command == "plan"
        else ()
    )
    answer = outlierq(command, llama_copy, *words)
    assert answer.code == 1 and "quantization_config in config.json is" in answer.out + answer.err
