"""A folder is read exactly, or refused with a message that says what is wrong and what to try."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from outlierq.core.errors import SourceError
from outlierq.core.model import LARGE_FILE
from outlierq.export.writer import write_small
from outlierq.load import open_checkpoint
from outlierq.load.source.folder import FolderCheckpoint
from outlierq.pipeline.planning.plan import left_behind_notes

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}

EVERY_DTYPE = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "f16": torch.randn(7).half(),
    "f32": torch.randn(2, 2, 2),
    "f64": torch.randn(2).double(),
    "i8": torch.arange(-3, 4, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "i32": torch.tensor(7, dtype=torch.int32),
    "i64": torch.arange(4),
    "bool": torch.tensor([True, False, True]),
    "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}


def write_folder(folder: Path, config: dict | None = None, **shards: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder; one shard becomes model.safetensors, several get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    if len(shards) == 1:
        save_file(next(iter(shards.values())), folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{shard}.safetensors"))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: dict | bytes, payload: bytes = b"") -> Path:
    """A folder whose model.safetensors has a hand-made header."""
    folder = write_folder(folder, None, model={"a": torch.zeros(1)})
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return folder


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def refusal(source: Path | str, **options) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(source), **options)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", one={"a": torch.zeros(4, 4), "b": torch.ones(2)}, two={"c": torch.ones(3)})


def test_every_dtype_is_read_as_stored(tmp_path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, model=EVERY_DTYPE)))
    assert checkpoint.tensors.keys() == EVERY_DTYPE.keys()
    for name, expected in EVERY_DTYPE.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), name
        assert checkpoint.tensors[name].nbytes == expected.nbytes


def test_shards_are_read_through_the_index(sharded):
    checkpoint = open_checkpoint(str(sharded))
    found = checkpoint.read_many(["c", "a", "b"])
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (4, 4), "b": (2,), "c": (3,)}
    assert torch.equal(found["c"], torch.ones(3))


def test_what_is_read_does_not_change_the_file(sharded):
    checkpoint = open_checkpoint(str(sharded))
    checkpoint.read("a").fill_(5)
    assert torch.equal(checkpoint.read("a"), torch.zeros(4, 4))


def test_an_unknown_tensor_gets_the_nearest_name(tmp_path):
    checkpoint = open_checkpoint(str(write_folder(tmp_path, model={"model.norm.weight": torch.ones(2)})))
    with pytest.raises(SourceError, match=r"no tensor model\.norm\.weigth") as caught:
        checkpoint.read("model.norm.weigth")
    assert "model.norm.weight?" in caught.value.hint


def test_small_files_of_the_top_level_are_carried_and_nothing_else(sharded):
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja", "generation_config.json", "modeling_x.py"):
        (sharded / name).write_text(name)
    (sharded / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "modeling_x.Processor"}}')
    for name in ("pytorch_model.bin", "model.onnx", ".gitattributes", "extra.safetensors", "x.bin.index.json"):
        (sharded / name).write_text(name)
    (sharded / "original").mkdir()
    (sharded / "original" / "params.json").write_text("{}")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    files = {file.name: file.read().decode() for file in open_checkpoint(str(sharded)).files}
    assert files.pop("additional_chat_templates/tool_use.jinja") == "tools" and files.pop("processor_config.json")
    plain = ["LICENSE", "chat_template.jinja", "generation_config.json", "modeling_x.py", "tokenizer.json"]
    assert list(files) == plain
    assert all(content == name for name, content in files.items())


RUBBISH = (
    "id_rsa", "credentials.json", "hf_token.txt", "wandb.key", "core.123", "nohup.out", "run.py", "big.tar.gz",
    "trainer_state.json", "adapter_model.safetensors", "adapter_config.json", "x.part", "deploy.py", "my_notes.log",
)  # fmt: skip


@pytest.mark.parametrize("name", RUBBISH)
def test_what_is_no_part_of_a_model_stays_and_is_named(name, sharded):
    (sharded / name).write_text("{}")
    (sharded / "checkpoint-500").mkdir()
    checkpoint = open_checkpoint(str(sharded))
    assert name not in [file.name for file in checkpoint.files]
    assert checkpoint.left_behind == tuple(sorted([name, "checkpoint-500/"]))
    notes = left_behind_notes(checkpoint.left_behind)
    assert len([note for note in notes if name in note]) == 1


@pytest.mark.parametrize(
    "secret", ["hf_" + "aB3" * 12, "-----BEGIN OPENSSH PRIVATE KEY-----", "AKIA" + "Z7" * 8, "ghp_" + "x1Y" * 12]
)
def test_a_file_that_holds_a_secret_stays_whatever_it_is_called(secret, sharded):
    for name in ("README.md", "chat_template.jinja"):
        (sharded / name).write_text(f"My token is {secret}.")
    checkpoint = open_checkpoint(str(sharded))
    assert checkpoint.files == ()
    assert [name.split(" (")[0] for name in checkpoint.left_behind] == ["README.md", "chat_template.jinja"]


def test_code_that_the_models_own_code_imports_travels_with_it(sharded):
    config = json.loads((sharded / "config.json").read_text())
    said = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "owner/other--modeling_y.Y"}
    (sharded / "config.json").write_text(json.dumps(config | {"auto_map": said}))
    (sharded / "configuration_x.py").write_text("from .helpers_x import thing\nfrom . import more_x\nimport os\n")
    for name in ("helpers_x", "more_x", "modeling_y", "train"):
        (sharded / f"{name}.py").write_text("")
    files = FolderCheckpoint(sharded).files
    assert [file.name for file in files] == ["configuration_x.py", "helpers_x.py", "more_x.py"]


def test_paths_of_the_machine_are_taken_out_of_settings(sharded):
    said = {"name_or_path": "/home/alice/secret-client", "tokenizer_file": "/tmp/x", "add_bos_token": True}
    (sharded / "tokenizer_config.json").write_text(json.dumps(said))
    (file,) = open_checkpoint(str(sharded)).files
    assert json.loads(file.read()) == {"add_bos_token": True}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": "auto"}, "float32"),
        ({}, "float32"),
    ],
)
def test_dtype_is_that_of_the_config_or_of_most_bytes(tmp_path, config, dtype):
    folder = write_folder(
        tmp_path, {"model_type": "llama", **config}, model={"a": torch.zeros(9), "b": torch.ones(2).half()}
    )
    assert open_checkpoint(str(folder)).dtype == dtype


def test_a_lone_safetensors_file_of_another_name_is_taken(tmp_path):
    folder = write_folder(tmp_path, model={"a": torch.ones(2)})
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert list(open_checkpoint(str(folder)).tensors) == ["a"]


def test_the_fingerprint_is_the_same_for_a_copy_and_for_resharded_weights(sharded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    merged = write_folder(tmp_path / "merged", model={"a": torch.zeros(4, 4), "b": torch.ones(2), "c": torch.ones(3)})
    prints = {open_checkpoint(str(folder)).fingerprint for folder in (sharded, copy, merged)}
    assert len(prints) == 1
    assert len(prints.pop()) == 64


def test_the_fingerprint_changes_with_one_weight_a_name_a_dtype_or_the_config(tmp_path):
    variants = [
        ({**CONFIG}, {"a": torch.zeros(4, 4)}),
        ({**CONFIG}, {"a": torch.zeros(4, 4).index_fill(0, torch.tensor([1]), 1e-6)}),
        ({**CONFIG}, {"b": torch.zeros(4, 4)}),
        ({**CONFIG}, {"a": torch.zeros(2, 8)}),
        ({**CONFIG}, {"a": torch.zeros(4, 8).half()}),
        ({**CONFIG, "rms_norm_eps": 1e-5}, {"a": torch.zeros(4, 4)}),
    ]
    prints = [
        open_checkpoint(str(write_folder(tmp_path / str(i), config, model=tensors))).fingerprint
        for i, (config, tensors) in enumerate(variants)
    ]
    assert len(set(prints)) == len(variants)


def test_a_missing_path_gets_the_nearest_name(sharded):
    message = refusal(sharded.parent / "modle")
    assert "modle does not exist" in message
    assert f"did you mean {sharded}?" in message


def test_a_folder_without_config_is_refused(tmp_path):
    assert "has no config.json" in refusal(tmp_path)


def test_a_folder_of_gguf_files_points_to_the_file(tmp_path):
    (tmp_path / "m.Q4_0.gguf").write_bytes(b"GGUF")
    assert f"name the GGUF file itself: {tmp_path / 'm.Q4_0.gguf'}" in refusal(tmp_path)


def test_a_folder_one_level_too_high_points_to_the_checkpoint(sharded):
    assert f"did you mean {sharded}?" in refusal(sharded.parent)


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "no weights" in refusal(tmp_path)


def test_several_safetensors_without_an_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "holds 2 safetensors files (one.safetensors, two.safetensors)" in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_as_a_file_and_in_a_folder(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps({}))
    for source in (tmp_path, tmp_path / name):
        message = refusal(source)
        assert f"{name} is a pickle" in message
        assert "convert it to safetensors" in message


def test_an_index_of_pickles_is_refused(sharded):
    write_index(sharded, {"a": "pytorch_model-00001-of-00002.bin"})
    assert "is a pickle" in refusal(sharded)


def test_one_file_of_a_folder_points_to_the_folder(sharded):
    assert f"name its folder: {sharded}" in refusal(sharded / "one.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a GGUF file nor a folder" in refusal(tmp_path / "notes.txt")


def test_a_truncated_shard_is_named_with_the_missing_bytes(sharded):
    path = sharded / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    message = refusal(sharded)
    assert "one.safetensors is cut off" in message
    assert "72 bytes of tensors, the file holds 62 (10 missing)" in message


@pytest.mark.parametrize("length", [0, 5, 30])
def test_a_file_cut_inside_its_header_is_named(sharded, length):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "two.safetensors" in refusal(sharded)


def test_a_file_that_shrinks_after_opening_is_noticed_when_read(sharded):
    checkpoint = open_checkpoint(str(sharded))
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match="ended while reading c: 4 bytes missing"):
        checkpoint.read("c")


def test_a_git_lfs_pointer_is_no_safetensors_file(sharded):
    (sharded / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in refusal(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    assert "names two.safetensors, which is not in" in refusal(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, shard):
    outside = sharded.parent / "outside.safetensors"
    save_file({"c": torch.ones(3)}, outside)
    (sharded / "sub").mkdir()
    write_index(sharded, {"c": str(outside) if shard == "absolute" else shard})
    assert "lies outside of the checkpoint folder" in refusal(sharded)


@pytest.mark.parametrize("name", ["two.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(sharded, name):
    moved = (sharded / name).rename(sharded.parent / f"moved-{name}")
    (sharded / name).symlink_to(moved)
    assert f"{name} lies outside of the checkpoint folder" in refusal(sharded)


def test_a_carried_file_that_is_a_link_out_of_the_folder_is_refused(sharded):
    (sharded.parent / "secret").write_text("secret")
    (sharded / "tokenizer.json").symlink_to(sharded.parent / "secret")
    with pytest.raises(SourceError, match=r"tokenizer\.json lies outside"):
        _ = open_checkpoint(str(sharded)).files


def test_a_link_inside_the_folder_is_followed(sharded):
    (sharded / "two.safetensors").rename(sharded / "real.safetensors")
    (sharded / "two.safetensors").symlink_to("real.safetensors")
    assert "c" in open_checkpoint(str(sharded)).tensors


def test_a_tensor_in_two_shards_is_named_with_both(sharded):
    save_file({"b": torch.ones(2), "c": torch.ones(3)}, sharded / "two.safetensors")
    message = refusal(sharded)
    assert "tensor b is in two shards: one.safetensors and two.safetensors" in message


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    assert "tensor b is in one.safetensors, but the index puts it into two.safetensors" in refusal(sharded)


def test_an_index_that_forgets_a_tensor_is_refused(sharded):
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    assert "tensor b is in one.safetensors, but the index does not name it" in refusal(sharded)


def test_an_index_that_names_a_tensor_nobody_holds_is_refused(sharded):
    write_index(
        sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}
    )
    assert "puts d into two.safetensors, which does not hold it" in refusal(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(sharded)


@pytest.mark.parametrize(("content", "fault"), [("{", "is not JSON"), ("[1]", "is a list"), ("\xff", "is not JSON")])
def test_a_broken_config_is_refused(sharded, content, fault):
    (sharded / "config.json").write_bytes(content.encode("latin-1"))
    assert f"config.json {fault}" in refusal(sharded)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b"{not json", "is not JSON"),
        (b"[1, 2]", "is a list, not an object"),
        (b'{"a": 1, "a": 2}', "names a twice"),
        ({"a": 5}, "has no dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "has no dtype, shape and data_offsets"),
        ({"a": entry("F32", [-1], 0, 4)}, "not counts"),
        ({"a": entry("F32", [1], -4, 0)}, "not counts"),
        ({"a": entry("F32", [True], 0, 4)}, "not counts"),
        ({"a": entry("F32", [3], 0, 8)}, r"needs 12 bytes, offsets give 8"),
        ({"a": entry("F32", [2], 8, 0)}, r"needs 8 bytes, offsets give -8"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "tensor b in model.safetensors overlaps a"),
        ({"a": entry("F32", [1], 4, 8)}, "leaves 4 unused bytes after the header"),
        ({"a": entry("F32", [99], 0, 396)}, "is cut off"),
        ({"a": entry("F32", [1], 0, 4)}, "holds 8 bytes after its last tensor"),
        ({"a": entry("F4", [4], 0, 2)}, "has dtype F4, which is not supported (supported: BOOL"),
        ({"a": entry("X", [1], 0, 4)}, "has dtype X, which is not supported"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, fault):
    assert fault in refusal(write_raw(tmp_path, header, bytes(12)))


def test_remote_code_is_not_run_unasked(tmp_path):
    config = {"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "modeling_made_up.MadeUp"}}
    folder = write_folder(tmp_path, config, model={"a": torch.ones(2)})
    message = refusal(folder)
    assert "brings its own model code (modeling_made_up.py)" in message
    assert "--trust-remote-code" in message
    assert open_checkpoint(str(folder), trust_remote_code=True).tensors.keys() == {"a"}


def test_a_model_that_transformers_implements_needs_no_remote_code(tmp_path):
    config = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_llama.Llama"}}
    assert open_checkpoint(str(write_folder(tmp_path, config, model={"a": torch.ones(2)}))).tensors.keys() == {"a"}


def test_a_revision_of_a_local_folder_is_refused(sharded):
    assert "revision main makes sense for a Hub id only" in refusal(sharded, revision="main")


def test_a_large_file_is_copied_and_not_read_whole(sharded, tmp_path):
    with open(sharded / "tokenizer.json", "wb") as file:
        file.truncate(LARGE_FILE + 5)
    (file,) = open_checkpoint(str(sharded)).files
    assert file.held() == sharded / "tokenizer.json"
    write_small(tmp_path, {"tokenizer.json": file.held(), "additional_chat_templates/x.jinja": b"x"})
    assert (tmp_path / "tokenizer.json").stat().st_size == LARGE_FILE + 5
    assert (tmp_path / "additional_chat_templates" / "x.jinja").read_bytes() == b"x"


def test_a_header_that_is_longer_than_its_tensors_is_refused_at_once(sharded):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{number}.weight": entry for number in range(80_000)}).encode()
    (sharded / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"a header of {len(header):,} bytes for 0 bytes of tensors" in refusal(sharded)
