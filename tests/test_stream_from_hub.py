"""Downloads from a Hub on loopback: gone on with, checked, and for models larger than the disk one shard at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from conftest import SMALL_CALIBRATION, folder_hashes

from outlierq.core.errors import SourceError
from outlierq.load import open_checkpoint, stream_checkpoint

REPO = "maker/tiny"


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory, tools) -> Path:
    """A model of 6 blocks in some 20 shards, with a head of its own. Read-only."""
    folder = tmp_path_factory.mktemp("models") / "many-shards"
    return tools.write_llama(folder, seed=3, shards="25KB", num_hidden_layers=6, tie_word_embeddings=False)


@pytest.fixture
def published(hub, many_shards, monkeypatch) -> str:
    """The commit under which the model is on the Hub. A request for a header asks for less than these small files."""
    from outlierq.load.hub import remote

    monkeypatch.setattr(remote, "FIRST_BYTES", 100)
    return hub.put(REPO, many_shards)


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every file but the report, which holds times and places."""
    return {name: digest for name, digest in folder_hashes(folder).items() if name != "outlierq.json"}


def fetched(hub) -> list[str]:
    """Names of shards in the order in which their first byte was fetched as a part of a whole download."""
    return [path for path, first, last in hub.ranges if first == 0 and last == len(hub_file(hub, path))]


def hub_file(hub, name: str) -> bytes:
    return hub.content(REPO)[name]


class TestDownload:
    def test_a_download_that_breaks_off_goes_on_where_it_was(self, hub, published, many_shards, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what it writes at a time; else 10 MB
        name = sorted(path.name for path in many_shards.glob("*.safetensors"))[1]
        hub.cuts[name] = 1000
        checkpoint = open_checkpoint(REPO)
        assert (name, 1000, len(hub_file(hub, name))) in hub.ranges
        assert checkpoint.revision == published
        assert (checkpoint.path / name).read_bytes() == hub_file(hub, name)

    def test_a_file_that_is_not_the_one_the_hub_lists_is_refused_with_both_digests(self, hub, published, many_shards):
        name = sorted(path.name for path in many_shards.glob("*.safetensors"))[0]
        sound = hub_file(hub, name)
        hub.spoilt[name] = sound[:-1] + bytes([sound[-1] ^ 1])
        with pytest.raises(SourceError, match=f"{name} is damaged") as caught:
            open_checkpoint(REPO)
        for content in (sound, hub.spoilt[name]):
            assert hashlib.sha256(content).hexdigest() in caught.value.what
        assert "remove" in caught.value.hint
        Path(caught.value.hint.split()[1]).unlink()
        hub.spoilt.clear()
        assert open_checkpoint(REPO).revision == published

    def test_what_was_checked_is_not_read_again_until_it_changes(self, hub, published, many_shards, monkeypatch):
        from outlierq.load.hub import content

        digests = []
        monkeypatch.setattr(content, "_digest", lambda path, wanted: digests.append(path) or wanted)
        folder = open_checkpoint(REPO).path
        count = len(list(many_shards.glob("*.safetensors")))
        assert len(digests) == count > 10
        open_checkpoint(REPO)
        assert len(digests) == count
        next(folder.glob("*.safetensors")).resolve().touch()
        open_checkpoint(REPO)
        assert len(digests) == count + 1


class TestHeaders:
    def test_a_plan_for_a_hub_id_fetches_no_weights(self, hub, published, many_shards, outlierq, tmp_path):
        answer = outlierq("plan", REPO, "-r", "rtn-w4", "--json")
        local = outlierq("plan", many_shards, "-r", "rtn-w4", "--json")
        assert answer.code == local.code == 0, answer.err
        assert json.loads(answer.out)["output_bytes"] == json.loads(local.out)["output_bytes"]
        assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))

    def test_a_hub_id_is_inspected_without_its_weights(self, hub, published, many_shards, outlierq, tmp_path):
        here, there = (json.loads(outlierq("inspect", model, "--json").out) for model in (many_shards, REPO))
        assert {**here, "source": ""} == {**there, "source": ""}
        assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))

    def test_the_fingerprint_is_that_of_the_same_model_in_a_folder(self, hub, published, many_shards):
        streamed = stream_checkpoint(REPO, None)
        assert streamed.fingerprint == open_checkpoint(str(many_shards)).fingerprint
        assert streamed.revision == published

    def test_a_header_longer_than_the_first_request_is_read_to_its_end(self, hub, published, many_shards):
        assert stream_checkpoint(REPO, None).tensors == open_checkpoint(str(many_shards)).tensors

    def test_a_repository_of_pickles_is_refused(self, hub, tmp_path):
        (tmp_path / "pickled").mkdir()
        (tmp_path / "pickled" / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
        hub.put("maker/pickled", tmp_path / "pickled")
        with pytest.raises(SourceError, match=r"pytorch_model\.bin is a pickle"):
            stream_checkpoint("maker/pickled", None)

    def test_a_local_folder_cannot_be_streamed(self, many_shards, outlierq, tmp_path):
        answer = outlierq("quantize", many_shards, "-r", "rtn-w4", "-o", tmp_path / "out", "--stream-from-hub")
        assert answer.code == 1
        assert "is no Hub id" in answer.err


class DiskWatch:
    """The most bytes of weights under the folder, and the most files, at the time of any request to the Hub."""

    def __init__(self, hub, folder: Path):
        self.folder, self.bytes, self.files = folder, 0, 0
        hub.breaks = self.look

    def look(self, method: str = "", path: str = "") -> None:
        found = [file.stat().st_size for file in self.folder.glob("*.safetensors")]
        self.bytes, self.files = max(self.bytes, sum(found)), max(self.files, len(found))


RECIPES = {
    "data-free": ("-r", "rtn-w4"),
    "calibrated": ("-r", "gptq-w4", *SMALL_CALIBRATION, "--set", "calibration.mode=static"),
    "rewritten": ("-r", "rotate-w4a8", *SMALL_CALIBRATION),
}


class TestStream:
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    def test_the_result_is_that_of_a_local_folder_and_few_shards_lie_on_the_disk(
        self, hub, published, many_shards, outlierq, tmp_path, recipe
    ):
        assert outlierq("quantize", many_shards, *recipe, "-o", tmp_path / "local", "-q").code == 0
        watch = DiskWatch(hub, tmp_path / "out.shards")
        answer = outlierq("quantize", REPO, *recipe, "-o", tmp_path / "out", "--stream-from-hub", "-q")
        assert answer.code == 0, answer.err
        assert weights(tmp_path / "out") == weights(tmp_path / "local")
        shards = sorted(many_shards.glob("*.safetensors"))
        assert 2 <= watch.files <= 8 < len(shards)
        assert watch.bytes <= 8 * max(path.stat().st_size for path in shards)
        assert not (tmp_path / "out.shards").exists()
        assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))

    def test_every_shard_comes_about_once(self, hub, published, many_shards, outlierq, tmp_path):
        assert outlierq("quantize", REPO, "-r", "rtn-w4", "-o", tmp_path / "o", "--stream-from-hub", "-q").code == 0
        count = len(list(many_shards.glob("*.safetensors")))
        # The one with the norm after the last block is needed at the beginning and at the end.
        assert count <= len(fetched(hub)) <= count + 2

    def test_a_reader_of_the_log_sees_what_is_fetched(self, hub, published, outlierq, tmp_path):
        answer = outlierq("quantize", REPO, "-r", "rtn-w4", "-o", tmp_path / "out", "--stream-from-hub")
        assert answer.code == 0 and "fetch 0/" in answer.err

    def test_statistics_are_those_of_a_local_folder(self, hub, published, many_shards, outlierq, tmp_path):
        small = ("--samples", "6", "--sequence-length", "32", "-q")
        assert outlierq("calibrate", many_shards, "-o", tmp_path / "local", *small).code == 0
        watch = DiskWatch(hub, tmp_path / "stats.shards")
        answer = outlierq("calibrate", REPO, "-o", tmp_path / "stats", "--stream-from-hub", *small)
        assert answer.code == 0, answer.err
        assert folder_hashes(tmp_path / "stats") == folder_hashes(tmp_path / "local")
        assert 2 <= watch.files <= 5
        assert not (tmp_path / "stats.shards").exists()


class TestStop:
    """What a run that ended early leaves, and how it goes on."""

    @pytest.fixture
    def stopped(self, hub, published, outlierq, tmp_path):
        """A run that ended when the Hub refused the shards after the ninth; gives the words of its command."""
        words = ("quantize", REPO, "-r", "rtn-w4", "-o", tmp_path / "out", "--stream-from-hub", "-q")
        seen: set[str] = set()

        def refuse(method: str, path: str) -> int | None:
            name = path.rpartition("/")[2]
            if method == "GET" and name.endswith(".safetensors"):
                seen.update(fetched(hub))
                return 404 if len(seen) >= 9 and name not in seen else None
            return None

        hub.breaks = refuse
        answer = outlierq(*words)
        assert answer.code == 1
        assert "could not be fetched" in answer.err
        assert "run the same command again" in answer.err
        hub.breaks = None
        return words

    def test_it_goes_on_and_asks_for_no_shard_of_a_finished_block(self, hub, stopped, many_shards, outlierq, tmp_path):
        done = [json.loads(line).get("unit") for line in (tmp_path / "out.partial/.outlierq-journal.jsonl").open()]
        done = [unit for unit in done if unit]
        assert len(done) >= 2
        hub.ranges.clear()
        assert outlierq(*stopped).code == 0
        finished = {f"model.layers.{unit.removeprefix('block-')}." for unit in done}
        stored = stream_checkpoint(REPO, None)._stored
        still = {t.path.name for name, t in stored.items() if not name.startswith(tuple(finished)) and "layers" in name}
        assert set(fetched(hub)) <= still
        assert outlierq("quantize", many_shards, "-r", "rtn-w4", "-o", tmp_path / "local", "-q").code == 0
        assert weights(tmp_path / "out") == weights(tmp_path / "local")

    def test_it_goes_on_with_its_commit_when_the_branch_has_moved(
        self, hub, stopped, many_shards, outlierq, tmp_path, tools
    ):
        hub.put(REPO, tools.write_llama(tmp_path / "new", seed=9, num_hidden_layers=6, tie_word_embeddings=False))
        assert outlierq(*stopped).code == 0
        assert outlierq("quantize", many_shards, "-r", "rtn-w4", "-o", tmp_path / "local", "-q").code == 0
        assert weights(tmp_path / "out") == weights(tmp_path / "local")

    def test_what_is_known_of_it_can_be_read(self, published, stopped, outlierq, tmp_path):
        answer = outlierq("inspect", tmp_path / "out")
        assert answer.code == 0
        said = dict(line.split(maxsplit=1) for line in answer.out.splitlines() if not line.startswith("units done"))
        assert (said["model"], said["commit"], said["recipe"], said["units"]) == (REPO, published, "rtn-w4", "7")
        assert "units done" in answer.out and "the same command continues" in said["next"]

    def test_restart_takes_what_the_branch_stands_for_now(self, hub, stopped, outlierq, tmp_path, tools):
        new = tools.write_llama(tmp_path / "new", seed=9, num_hidden_layers=6, tie_word_embeddings=False)
        hub.put(REPO, new)
        assert outlierq(*stopped, "--restart").code == 0
        assert outlierq("quantize", new, "-r", "rtn-w4", "-o", tmp_path / "local", "-q").code == 0
        assert weights(tmp_path / "out") == weights(tmp_path / "local")


class TestStore:
    @pytest.fixture
    def name(self, many_shards) -> str:
        return sorted(path.name for path in many_shards.glob("*.safetensors"))[1]

    def test_half_a_shard_of_a_killed_process_is_fetched_on(self, hub, published, name, tmp_path):
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        whole = hub_file(hub, name)
        (tmp_path / "shards" / f"{name}.outlierq-part").write_bytes(whole[:1000])
        with checkpoint.store.open(name) as file:
            assert file.read() == whole
        assert [first for path, first, last in hub.ranges if path == name and last == len(whole)] == [1000]

    def test_half_a_shard_with_a_hole_is_fetched_anew(self, hub, published, name, tmp_path):
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        (tmp_path / "shards" / f"{name}.outlierq-part").write_bytes(bytes(1000))
        with checkpoint.store.open(name) as file:
            assert file.read() == hub_file(hub, name)

    def test_a_whole_shard_of_a_killed_process_is_checked_before_it_is_used(self, hub, published, name, tmp_path):
        whole = hub_file(hub, name)
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        (tmp_path / "shards" / name).write_bytes(whole[:-1] + b"?")
        with checkpoint.store.open(name) as file:
            assert file.read() == whole

    def test_a_shard_that_is_not_the_one_the_hub_lists_is_refused_and_does_not_stay(
        self, hub, published, name, tmp_path
    ):
        whole = hub_file(hub, name)
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        hub.spoilt[name] = whole[:-1] + bytes([whole[-1] ^ 1])
        with pytest.raises(SourceError, match=f"{name} of {REPO} is damaged") as caught:
            checkpoint.store.open(name)
        assert hashlib.sha256(whole).hexdigest() in caught.value.what
        hub.spoilt.clear()
        with checkpoint.store.open(name) as file:
            assert file.read() == whole

    def test_the_one_read_longest_ago_makes_room(self, hub, published, many_shards, tmp_path):
        names = sorted(path.name for path in many_shards.glob("*.safetensors"))[:4]
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        checkpoint.store.keep = 3
        for name in (*names[:3], names[0], names[3]):
            checkpoint.store.open(name).close()
        assert sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors")) == [names[0], *names[2:]]

    def test_many_threads_read_what_is_there_though_it_has_to_go(self, hub, published, many_shards, tmp_path):
        from concurrent.futures import ThreadPoolExecutor

        import torch

        local, streamed = open_checkpoint(str(many_shards)), stream_checkpoint(REPO, tmp_path / "shards")
        streamed.store.keep = 2
        with ThreadPoolExecutor(4) as pool:
            for name, tensor in zip(local.tensors, pool.map(streamed.read, local.tensors), strict=True):
                assert torch.equal(tensor, local.read(name)), name

    def test_no_second_process_may_use_it(self, hub, published, tmp_path):
        first = stream_checkpoint(REPO, tmp_path / "shards")
        with pytest.raises(SourceError, match="another outlierq puts its shards into"):
            stream_checkpoint(REPO, tmp_path / "shards")
        first.store.close()
        stream_checkpoint(REPO, tmp_path / "shards").store.clear()
        assert not (tmp_path / "shards").exists()

    @pytest.mark.parametrize("kind", ["file", "shard of another model", "folder"])
    def test_what_somebody_put_into_its_folder_is_left_alone(self, kind, hub, published, tmp_path):
        mine = tmp_path / "shards" / ("other.safetensors" if kind == "shard of another model" else "mine")
        mine.parent.mkdir()
        mine.mkdir() if kind == "folder" else mine.write_text("precious")
        with pytest.raises(SourceError, match=f"is in the way: it holds {mine.name}"):
            stream_checkpoint(REPO, tmp_path / "shards")
        assert [path.name for path in mine.parent.iterdir()] == [mine.name]

    def test_a_refused_run_leaves_nothing(self, hub, published, outlierq, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("")
        answer = outlierq("quantize", REPO, "-r", "rtn-w4", "-o", tmp_path / "out", "--stream-from-hub", "-q")
        assert answer.code == 1 and "exists already" in answer.err
        assert not (tmp_path / "out.shards").exists()

    def test_a_shard_that_is_read_after_the_end_is_fetched_once_more(self, hub, published, name, tmp_path):
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        for _ in range(2):
            with checkpoint.store.open(name) as file:
                assert file.read() == hub_file(hub, name)
            checkpoint.store.clear()
        assert fetched(hub) == [name, name]

    def test_what_the_cache_holds_already_is_taken_from_there(self, hub, published, name, tmp_path):
        open_checkpoint(REPO)
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        hub.ranges.clear()
        tensor = next(tensor for tensor, at in checkpoint._stored.items() if at.path.name == name)
        checkpoint.read(tensor)
        assert hub.ranges == []

    def test_an_address_that_has_expired_is_asked_for_again(self, hub, published, name, tmp_path):
        checkpoint = stream_checkpoint(REPO, tmp_path / "shards")
        answers = [403]
        hub.breaks = lambda method, path: answers.pop() if answers and method == "GET" and name in path else None
        with checkpoint.store.open(name) as file:
            assert file.read() == hub_file(hub, name)
