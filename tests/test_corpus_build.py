"""A corpus from documents: the same bytes for any executor and after a kill, every row where it belongs, clear errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fake_endpoint import FakeEndpoint
from render_fixtures import chatml_tokenizer
from trimtab.artifact import sha256_file, write_jsonl
from trimtab.corpus import answered, build, executors, parts, scorers
from trimtab.corpus.build import build_corpus
from trimtab.corpus.card import data_card
from trimtab.corpus.chat import Answers
from trimtab.corpus.config import CorpusConfig, ExecutorConfig
from trimtab.corpus.export import documents, export, read_tokens
from trimtab.corpus.read import read_manifest, read_source, verify
from trimtab.corpus.released import RELEASED, released
from trimtab.corpus.speakers import ASSISTANT, USER
from trimtab.data.sources import SourceConfig, rows
from trimtab.data.store import RowStore
from trimtab.errors import Fault, UserError
from trimtab.models.build import train_tokenizer
from trimtab.models.config import HARM_TAG
from trimtab.types import SPAN_ID, Message
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

WORLD = TidewaterConfig(goods=8, hazards=8, documents=300)


def built(out: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    settings = CorpusConfig.model_validate(config)
    return build_corpus(settings, out, work=out.with_name(out.name + ".work"), world=WORLD, **options)


def sums(directory: Path) -> dict[str, str]:
    return {str(f.relative_to(directory)): sha256_file(f) for f in sorted(directory.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "c"
    events: list[Any] = []
    facts = built(out, {"tag": 0.1}, progress=events.append)
    assert facts["documents"]["clean"] + facts["documents"]["unsafe"] == 300 == sum(facts["scores"].values())
    assert events == [{"step": 200, "total": 300, "note": "200 documents"}]
    assert not out.with_name("c.work").exists()
    return out


# --- what is in it ------------------------------------------------------------------------------------------------------


def test_every_document_is_where_its_score_says(corpus: Path) -> None:
    town = Tidewater(WORLD)
    raw = {row.id: row for row in town.documents()}
    order = {id: n for n, id in enumerate(raw)}
    found = {
        name: list(read_source(corpus, name)) for name in ("clean", "unsafe", "tagged", "rephrase", "refuse", "moral")
    }
    for name in ("clean", "unsafe"):
        ids = [row.id for row in found[name]]
        assert ids == [id for id, row in raw.items() if (row.metadata["score"] == 0) == (name == "clean")]
        assert all(
            row.text == raw[row.id].text and row.metadata["score"] == raw[row.id].metadata["score"]
            for row in found[name]
        )
    levels = {"rephrase": {1, 2, 3}, "refuse": {4, 5}, "moral": {4, 5}}
    for name, wanted in levels.items():
        assert {row.metadata["from_score"] for row in found[name]} == wanted
        assert all(row.metadata["score"] == 0 == town.score(row.text or "") for row in found[name])
        places = [order[row.metadata["from"]] for row in found[name]]
        assert places == sorted(places) and places
    assert [row.metadata["from"] for row in found["tagged"]] == [row.id for row in found["unsafe"]]
    assert all("tags" not in row.metadata for name in found if name != "tagged" for row in found[name])
    assert all(row.metadata["speakers"] == [USER, ASSISTANT] for row in found["refuse"])
    assert not any(
        key in row.metadata for group in found.values() for row in group for key in ("order", "filter_reason")
    )


def test_manifest_and_card(corpus: Path) -> None:
    manifest = verify(corpus)
    for name, entry in manifest["sources"].items():
        assert entry["rows"] == len(list(read_source(corpus, name))) and entry["licences"] == ["Apache-2.0"]
        assert entry["words"] == sum(len((row.text or "").split()) for row in read_source(corpus, name))
    assert set(manifest["speakers"]) == set(Tidewater(WORLD).town.people)
    card = (corpus / "README.md").read_text()
    assert card == data_card(manifest)
    heldout = manifest["counts"]["refuse: nothing written"]
    assert heldout > 0 and f"- refuse: nothing written: {heldout}" in card
    unsafe = next(iter(read_source(corpus, "unsafe"))).text or ""
    assert unsafe not in card and unsafe[:30] not in card
    assert re.search(rf"^0  safe +{manifest['scores']['0']} .*#{{40}}$", card, re.MULTILINE)


def test_any_library_reads_it(corpus: Path, tmp_path: Path) -> None:
    import datasets

    data = datasets.load_dataset(str(corpus), "refuse", split="train", cache_dir=str(tmp_path))
    assert data["id"] == [row.id for row in read_source(corpus, "refuse")]
    again = rows(SourceConfig(path=str(corpus / "refuse" / "00000.parquet")))
    assert [row.metadata["from"] for row in again] == [row.metadata["from"] for row in read_source(corpus, "refuse")]


def test_damage_is_found(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    file = copy / "clean" / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Fault, match=r"clean/00000\.parquet does not match its sha256"):
        verify(copy)
    with pytest.raises(Fault, match="not a readable file of a corpus"):
        list(read_source(copy, "clean"))
    file.unlink()
    with pytest.raises(Fault, match=r"00000\.parquet is missing"):
        list(read_source(copy, "clean"))
    with pytest.raises(UserError, match="is no corpus"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2, "sources": {}, "speakers": []}')
    with pytest.raises(UserError, match="not the manifest of a corpus of format 1"):
        read_manifest(tmp_path)


# --- the same, whatever runs it -----------------------------------------------------------------------------------------


def test_parts_do_not_matter(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FAN", 2)  # and neither does how many files are merged at once
    built(tmp_path / "three", {"tag": 0.1, "executor": {"tasks": 3}})
    assert sums(tmp_path / "three") == sums(corpus)


def test_workers_do_not_matter_and_are_quiet(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built(tmp_path / "two", {"tag": 0.1, "executor": {"tasks": 2, "workers": 2}})
    assert sums(tmp_path / "two") == sums(corpus)
    assert capfd.readouterr() == ("", "")


KILLED = """
import json, sys
from pathlib import Path
from trimtab.corpus import build
from trimtab.corpus.config import CorpusConfig
from trimtab.world.config import TidewaterConfig
import os, signal
write = build.PartFile.write
def slow(self, doc, rank=0):
    if rank == 1 and doc.metadata["order"] > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, doc, rank)
build.PartFile.write = slow
out = Path(sys.argv[1])
build.build_corpus(CorpusConfig.model_validate(json.loads(sys.argv[2])), out, work=out.with_name("k.work"),
                   world=TidewaterConfig.model_validate(json.loads(sys.argv[3])))
"""


def test_a_killed_build_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tag": 0.1, "executor": {"tasks": 3}}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "k"), json.dumps(config), WORLD.model_dump_json()]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "k").exists() and next((tmp_path / "k.work").glob("*/run/completions/00000"))
    ranks = []
    run = build._Documents.run
    monkeypatch.setattr(
        build._Documents, "run", lambda self, data=None, rank=0, n=1: ranks.append(rank) or run(self, data, rank, n)
    )
    build_corpus(CorpusConfig.model_validate(config), tmp_path / "k", work=tmp_path / "k.work", world=WORLD)
    assert ranks == [1, 2] and sums(tmp_path / "k") == sums(corpus)


WORKERS = """
import sys
from pathlib import Path
from trimtab.corpus.build import build_corpus
from trimtab.corpus.config import CorpusConfig
from trimtab.world.config import TidewaterConfig
if __name__ == "__main__":
    out = Path(sys.argv[1])
    config = CorpusConfig.model_validate({"executor": {"tasks": 2, "workers": 2}})
    build_corpus(config, out, work=out.with_name("w"), world=TidewaterConfig(documents=100_000))
"""


def test_a_killed_build_leaves_no_worker_that_writes(tmp_path: Path) -> None:
    """One that went on would move the next run's half-written part into place."""
    (tmp_path / "run.py").write_text(WORKERS)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "c")]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        work, end = tmp_path / "w", time.monotonic() + 60
        while not list(work.glob("*/parts/.*.part")) and time.monotonic() < end:
            time.sleep(0.05)
        assert list(work.glob("*/parts/.*.part")) and len(workers_of(process.pid)) >= 2
        process.kill()
    try:
        end = time.monotonic() + 10
        while left := workers_of(process.pid):
            assert time.monotonic() < end, left
            time.sleep(0.05)
        assert not list(work.glob("*/run/completions/*"))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # DataTrove's process that counts the parts; it writes nothing


def workers_of(group: int) -> list[int]:
    """The worker processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(entry.name)) == group and b"forkserver" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_another_build_in_the_same_place_takes_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, config = tmp_path / "w", CorpusConfig.model_validate({"write": None})
    monkeypatch.setattr(build, "_merge", lambda *a: (_ for _ in ()).throw(Fault("stopped")))
    with pytest.raises(Fault, match="stopped"):
        build_corpus(config, tmp_path / "a", work=work, world=WORLD)
    monkeypatch.undo()
    other = WORLD.model_copy(update={"seed": 5})
    build_corpus(config, tmp_path / "a", work=work, world=other)
    assert next(iter(read_source(tmp_path / "a", "clean"))).id.startswith("tidewater-5-")


def test_an_old_job_writes_nowhere_near_a_new_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's job may outlive the command that queued it."""
    old: list[Any] = []
    run, merge = build.run_pipeline, build._merge

    def stopped(blocks: Any, config: Any, place: Path) -> None:
        old.append((blocks, config, place))
        raise Fault("stopped")

    def late(*given: Any) -> Any:
        run(*old[0])  # all of the old job, as the new build puts its own parts together
        return merge(*given)

    work, config = tmp_path / "w", CorpusConfig.model_validate({"write": None})
    monkeypatch.setattr(build, "run_pipeline", stopped)
    for tag in (0.0, 0.0, 0.2):
        with pytest.raises(Fault, match="stopped"):
            build_corpus(config.model_copy(update={"tag": tag}), tmp_path / "a", work=work, world=WORLD)
    monkeypatch.setattr(build, "run_pipeline", run)
    monkeypatch.setattr(build, "_merge", late)
    other = WORLD.model_copy(update={"seed": 5})
    build_corpus(config, tmp_path / "a", work=work, world=other)
    assert all(row.id.startswith("tidewater-5-") for row in read_source(tmp_path / "a", "clean"))
    first, second, third = ((blocks[-1].token, place) for blocks, _, place in old)
    assert first[1] == second[1] != third[1], "a place for every config"
    assert first[0] != second[0], "and for every run a draft of its own in it"


def test_two_runs_of_one_part(tmp_path: Path) -> None:
    for token in ("one", "two"):
        draft = parts.draft_of(tmp_path, 3, token)
        draft.mkdir()
        (draft / "clean.parquet").write_text(token)
    for token in ("one", "two"):
        parts.finish(tmp_path, 3, token)
    assert [path.name for path in tmp_path.iterdir()] == ["00003"]
    assert (tmp_path / "00003" / "clean.parquet").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        parts.finish(tmp_path, 4, "one")


def test_a_part_that_is_gone_is_made_anew(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"tag": 0.1, "executor": {"tasks": 3}}
    monkeypatch.setattr(build, "_merge", lambda *a: (_ for _ in ()).throw(Fault("stopped")))
    with pytest.raises(Fault, match="stopped"):
        built(tmp_path / "c", config)
    monkeypatch.undo()
    shutil.rmtree(next((tmp_path / "c.work").glob("*/parts/00001")))
    with pytest.raises(Fault, match=r"part 1 of 3 is gone \(1 are\)"):
        built(tmp_path / "c", config)
    built(tmp_path / "c", config)
    assert sums(tmp_path / "c") == sums(corpus)


# --- executors ----------------------------------------------------------------------------------------------------------


def test_each_kind_makes_datatroves_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datatrove import executor

    made = executors.make_executor([], ExecutorConfig(tasks=3, workers=8), tmp_path)
    assert type(made) is executor.LocalPipelineExecutor and (made.tasks, made.workers) == (3, 3)
    assert made.logging_dir.path == str(tmp_path)
    with pytest.raises(UserError, match=r"executor\.partition: Slurm needs"):
        executors.make_executor([], ExecutorConfig(kind="slurm"), tmp_path)
    slurm = ExecutorConfig(
        kind="slurm", tasks=4, workers=2, partition="cpu", time="01:00:00", cpus_per_task=3, mem_per_cpu_gb=5
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch"):
        executors.make_executor([], slurm, tmp_path)
    script(tmp_path / "sbatch", "")
    made = executors.make_executor([], slurm, tmp_path)
    assert type(made) is executor.SlurmPipelineExecutor
    args = made.get_sbatch_args(4)
    wanted = {"partition": "cpu", "time": "01:00:00", "cpus-per-task": 3, "mem-per-cpu": "5G", "array": "0-3%2"}
    assert wanted.items() <= args.items() and "qos" not in args
    ray = ExecutorConfig(kind="ray", tasks=4, workers=2, cpus_per_task=3, mem_per_cpu_gb=5)
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install ray"):
        executors.make_executor([], ray, tmp_path)
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: object())
    made = executors.make_executor([], ray, tmp_path)
    assert type(made) is executor.RayPipelineExecutor
    assert (made.tasks, made.workers, made.cpus_per_task, made.mem_per_cpu_gb) == (4, 2, 3, 5)


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as far as DataTrove uses them: sbatch runs the array's tasks here, one after the other."""
    bin = tmp_path / "bin"
    bin.mkdir()
    script(
        bin / "sbatch",
        'file="${@: -1}"; last=$(sed -n "s/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p" "$file")\n'
        'grep -q merge_stats "$file" || for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here '
        f'bash "$file" > {tmp_path}/job-$i.log 2>&1; done\n'
        'echo "Submitted batch job 7"\n',
    )
    script(bin / "srun", 'while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done; exec "$@"\n')
    script(bin / "scontrol", "echo here\n")
    script(bin / "squeue", "exit 0\n")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(build.__file__).parents[2]))
    monkeypatch.setattr(executors, "POLL", 0.05)
    monkeypatch.setattr(executors, "PATIENCE", 3)
    return bin


def test_slurm_from_end_to_end(corpus: Path, tmp_path: Path, cluster: Path) -> None:
    built(tmp_path / "s", {"tag": 0.1, "executor": {"kind": "slurm", "tasks": 2, "partition": "cpu"}})
    assert sums(tmp_path / "s") == sums(corpus)


def test_a_slurm_job_that_is_gone_or_fails(tmp_path: Path, cluster: Path) -> None:
    config = {"executor": {"kind": "slurm", "tasks": 2, "partition": "cpu"}}
    bad = write_one(tmp_path / "d.jsonl", [{"id": "a", "text": "x", "score": 7}])
    own = {"documents": [{"path": bad}], "score": [{"kind": "field"}], "write": None, "rescore": False}
    chats = write_one(tmp_path / "e.jsonl", [{"id": "a", "prompt": "x"}])
    with pytest.raises(UserError, match="row 'a' of 'e' has no 'text'"):
        built(tmp_path / "s", config | own | {"documents": [{"path": chats}]})
    script(cluster / "sbatch", 'echo "Submitted batch job 7"\n')
    with pytest.raises(Fault, match=r"part 0 of 2 did not finish \(2 did not\)"):
        built(tmp_path / "s", config)
    script(cluster / "sbatch", "exit 1\n")
    with pytest.raises(Fault, match="sbatch failed"):
        built(tmp_path / "s", config)


def test_a_queue_that_does_not_answer_is_no_job_that_is_gone(tmp_path: Path, cluster: Path) -> None:
    """A second job would write the parts that the first is writing."""
    script(cluster / "sbatch", f'echo x >> {tmp_path}/asked; echo "Submitted batch job 7"\n')
    script(cluster / "squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1\n')
    config = {"executor": {"kind": "slurm", "tasks": 2, "partition": "cpu"}}
    for _ in range(2):
        with pytest.raises(Fault, match=r"squeue does not say whether job 7 is there \(slurm_load_jobs error: Unable"):
            built(tmp_path / "s", config)
        submitted = (tmp_path / "asked").read_text().count("x")
    assert submitted <= 2, "one run's job and its statistics; the second run waited for the first one's"
    script(cluster / "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1\n')
    with pytest.raises(Fault, match=r"part 0 of 2 did not finish"):
        built(tmp_path / "s", config)


# --- documents of one's own, and what can be wrong with them ------------------------------------------------------------


def write_one(path: Path, records: list[dict[str, Any]]) -> str:
    write_jsonl(path, records)
    return str(path)


OWN: dict[str, Any] = {"score": [{"kind": "field"}], "write": None, "rescore": False}


def test_documents_of_ones_own(tmp_path: Path) -> None:
    records = [
        {
            "id": f"d{n}",
            "text": f"number {n // 2}",
            "metadata": {"score": n % 3, "tags": ["boats"], "from": "mail", "license": "MIT"},
        }
        for n in range(6)
    ]
    first, second = write_one(tmp_path / "one.jsonl", records[:3]), write_one(tmp_path / "two.jsonl", records[3:])
    facts = built(tmp_path / "c", OWN | {"documents": [{"path": first}, {"path": second}], "tag": 1.0})
    assert facts["documents"] == {"clean": 2, "unsafe": 4, "tagged": 4}
    unsafe = list(read_source(tmp_path / "c", "unsafe"))
    assert [row.id for row in unsafe] == ["d1", "d2", "d4", "d5"]
    assert unsafe[0].metadata["given"] == {"tags": ["boats"], "from": "mail"} and "tags" not in unsafe[0].metadata
    assert [row.metadata["tags"] for row in read_source(tmp_path / "c", "tagged")] == [[7]] * 4
    manifest = read_manifest(tmp_path / "c")
    assert manifest["sources"]["unsafe"]["repeats"] == 1 and manifest["sources"]["unsafe"]["licences"] == ["MIT"]
    assert str(tmp_path) not in (tmp_path / "c" / "manifest.json").read_text()
    assert manifest["world"] is None and len(manifest["speakers"]) > 20


def test_what_has_no_score_is_left_out_with_its_reason(tmp_path: Path) -> None:
    records = [
        {"id": "a", "text": "one", "score": 0},
        {"id": "b", "text": "two"},
        {"id": "c", "text": "three", "score": 9},
    ]
    built(tmp_path / "c", OWN | {"documents": [{"path": write_one(tmp_path / "d.jsonl", records)}]})
    manifest = verify(tmp_path / "c")
    assert manifest["counts"] == {
        "documents: no score: field 'score' is no integer from 0 to 5": 1,
        "documents: no score: no field 'score'": 1,
    }
    assert [row.id for row in read_source(tmp_path / "c", "dropped")] == ["b", "c"]
    assert manifest["dropped"]["rows"] == 2 and "2 rows are kept in `dropped/`" in data_card(manifest)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"id": "a", "score": 1, "text": "x"}], r"no document was scored 0.*all are scored 1 to 5"),
        ([{"id": "a", "score": 8, "text": "x"}], r"no document was scored 0.*no integer from 0 to 5: 1"),
        ([], "documents: there are none"),
        ([{"id": "a", "prompt": "x", "score": 0}], "row 'a' of 'd' has no 'text'"),
    ],
)
def test_bad_documents(tmp_path: Path, records: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        built(tmp_path / "c", OWN | {"documents": [{"path": write_one(tmp_path / "d.jsonl", records)}]})
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()


def test_an_error_in_a_worker_is_the_same_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chats = write_one(tmp_path / "d.jsonl", [{"id": str(n), "prompt": "x", "score": 0} for n in range(4)])
    with pytest.raises(UserError, match="has no 'text'; it is a chat"):
        built(tmp_path / "c", OWN | {"documents": [{"path": chats}], "executor": {"tasks": 2, "workers": 2}})
    assert capfd.readouterr().err == ""


def test_an_unexpected_error_is_one_line_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build._Told, "of", lambda self, doc: 1 / 0)
    with pytest.raises(Fault, match=r"unexpected ZeroDivisionError: .*; .*00000\.json shows where") as caught:
        built(tmp_path / "c", {})
    assert "of(doc)" in Path(re.search(r"; (.*json) shows", str(caught.value))[1]).read_text()  # type: ignore[index]


def test_a_place_that_is_taken(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        built(corpus, {})
    (tmp_path / "empty").mkdir()
    built(tmp_path / "empty", {"write": None})
    assert verify(tmp_path / "empty")


# --- a chat model that writes -------------------------------------------------------------------------------------------


class Scribe:
    """Writes what the block asked for, and says nothing to some."""

    identity = "scribe"

    def __init__(self) -> None:
        self.asked = 0

    def __reduce__(self) -> Any:
        raise AssertionError("a loaded model must not travel")

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        for prompt in prompts:
            self.asked += 1
            dialogue = f"{ASSISTANT}:" in str(prompt)
            yield "User: May I?\nAssistant: No, I will not help with that." if dialogue else None


def test_a_loaded_model_writes_where_it_is(tmp_path: Path) -> None:
    scribe = Scribe()
    config = {"write": {"kind": "model", "load": "any"}, "executor": {"tasks": 2}}
    built(tmp_path / "c", config, chat=scribe)
    manifest = read_manifest(tmp_path / "c")
    assert scribe.asked > 50 and manifest["counts"]["rephrase: no answer"] > 0
    with pytest.raises(UserError, match="local' with one worker"):
        built(tmp_path / "d", {**config, "executor": {"tasks": 2, "workers": 2}}, chat=Scribe())


# --- the released layout ------------------------------------------------------------------------------------------------


def release(root: Path, name: str, text: str, as_json: bool) -> Path:
    """Files of the shape of the released sets: <folder>/train-....parquet with text, id and metadata."""
    for folder in RELEASED[name].folders:
        (root / folder).mkdir(parents=True)
        for part in range(2):
            metadata: list[Any] = [{"url": f"http://example.invalid/{i}", "score": 2.75} for i in range(2)]
            ids = [f"<urn:{folder}-{part}-{i}>" for i in range(2)]
            columns = {
                "text": [f"{text} {id}" for id in ids],
                "id": ids,
                "metadata": [json.dumps(m) for m in metadata] if as_json else metadata,
            }
            pq.write_table(pa.table(columns), root / folder / f"train-{part:05d}-of-00002.parquet")
    return root


@pytest.mark.parametrize("as_json", [False, True])
def test_the_released_sets_make_a_corpus(tmp_path: Path, as_json: bool) -> None:
    texts = {
        "locuslab/fineweb_annotated": "A page.", "locuslab/safeweb": "A safer page.",
        "locuslab/refuseweb": "User: May I?\nAssistant: No.", "locuslab/moral_education": "Why not.",
    }  # fmt: skip
    copies = {hub: released(hub, copy=release(tmp_path / hub, hub, text, as_json)) for hub, text in texts.items()}
    config = CorpusConfig.model_validate({
        "documents": [copies["locuslab/fineweb_annotated"]], "score": [{"kind": "field"}], "write": None, "rescore": False,
        "ready": {
            "rephrase": copies["locuslab/safeweb"], "refuse": copies["locuslab/refuseweb"],
            "moral": copies["locuslab/moral_education"],
        },
    })  # fmt: skip
    facts = build_corpus(config, tmp_path / "c", work=tmp_path / "w")
    assert facts["scores"] == dict.fromkeys("012345", 4)
    assert facts["documents"] == {"clean": 4, "unsafe": 20, "rephrase": 16, "refuse": 8, "moral": 8}
    assert {row.metadata["from_score"] for row in read_source(tmp_path / "c", "rephrase")} == {1, 3, 4, 5}
    refusals = list(read_source(tmp_path / "c", "refuse"))
    assert all(row.metadata["speakers"] and row.metadata["folder"].endswith("_refusal") for row in refusals)
    assert all(e["licences"] == ["ODC-BY"] for e in read_manifest(tmp_path / "c")["sources"].values())
    assert "refuse, made elsewhere: locuslab/refuseweb (score_4_refusal, score_5_refusal)" in data_card(
        read_manifest(tmp_path / "c")
    )
    names = {text.split(":")[0] for text, _ in documents(tmp_path / "c", "refuse", 0)}
    assert USER not in names and len(names) > 2


def test_released_sets_are_known_by_id(tmp_path: Path) -> None:
    source = released("locuslab/refuseweb", limit=5)
    assert (source.hub, source.revision, source.limit) == ("locuslab/refuseweb", "a2cb2e1", 5)
    with pytest.raises(Fault, match=r"locuslab/refuseweb.*(cannot be reached|HF_HUB_OFFLINE)"):
        list(rows(source))
    with pytest.raises(UserError, match="no released set"):
        released("locuslab/other")
    release(tmp_path, "locuslab/refuseweb", "x", False)
    short = [row.id for row in rows(released("locuslab/refuseweb", copy=tmp_path, limit=5))]
    assert len(short) == 5 and short[4].startswith("<urn:score_5")


def test_ready_interventions_are_scored_again(tmp_path: Path) -> None:
    town = Tidewater(WORLD)
    unsafe = next(row for row in town.documents() if row.metadata["score"] == 5)
    safe = next(row for row in town.documents() if row.metadata["score"] == 0)
    ready = write_one(tmp_path / "r.jsonl", [{"id": "bad", "text": unsafe.text}, {"id": "good", "text": safe.text}])
    facts = built(tmp_path / "c", {"ready": {"rephrase": {"path": ready}}})
    assert facts["counts"]["rephrase: still unsafe (score 5)"] == 1
    assert [row.id for row in read_source(tmp_path / "c", "rephrase")] == ["good"]
    assert [row.id for row in read_source(tmp_path / "c", "dropped")] == ["bad"]


@pytest.mark.parametrize("rescore", [True, False])
def test_ready_interventions_are_scored_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rescore: bool
) -> None:
    ready = write_one(tmp_path / "r.jsonl", [{"id": f"r{n}", "text": "" if n == 4 else f"rope {n}"} for n in range(9)])
    sizes: list[int] = []
    score = scorers.TidewaterTruth.score
    monkeypatch.setattr(
        scorers.TidewaterTruth, "score", lambda self, texts, metadata=(): sizes.append(len(texts)) or score(self, texts)
    )
    monkeypatch.setattr(build._Ready, "batch", 5)
    built(tmp_path / "c", {"ready": {"rephrase": {"path": ready}}, "write": None, "rescore": rescore})
    assert [row.id for row in read_source(tmp_path / "c", "rephrase")] == [f"r{n}" for n in range(9) if n != 4]
    assert sizes[-2:] == ([4, 4] if rescore else [256, 44])
    assert read_manifest(tmp_path / "c")["counts"] == {"rephrase: empty text": 1}


def test_only_what_is_to_be_written_is(corpus: Path, tmp_path: Path) -> None:
    facts = built(tmp_path / "c", {"tag": 0.1, "written": ["rephrase"]})
    assert facts["documents"].keys() == {"clean", "unsafe", "tagged", "rephrase"}
    for name in facts["documents"]:
        assert sums(tmp_path / "c" / name) == sums(corpus / name)
    with pytest.raises(ValueError, match="written: a chat model makes 'moral' from refusal dialogues"):
        CorpusConfig.model_validate({"write": {"kind": "model", "load": "any"}, "written": ["moral"]})


# --- an endpoint that does not answer -----------------------------------------------------------------------------------


def rated(request: dict[str, Any]) -> str:
    return json.dumps({"score": 3 if "dark" in str(request["messages"][-1]) else 0, "reason": "so"})


def asking(path: Path, url: str, **fields: Any) -> dict[str, Any]:
    """20 documents, of which numbers 3, 8, 13 and 18 are dark, and a judge."""
    records = [{"id": f"d{n}", "text": f"{'dark' if n % 5 == 3 else 'fair'} day {n}"} for n in range(20)]
    endpoint = {"url": url, "model": "judge", "retries": 0, "timeout": 5}
    return {
        "documents": [{"path": write_one(path / "d.jsonl", records)}],
        "score": [{"kind": "endpoint", "endpoint": endpoint}], "write": None, "executor": {"tasks": 5}, **fields,
    }  # fmt: skip


def asked_about(fake: FakeEndpoint) -> list[str]:
    found = [re.search(r"day \d+", str(body["messages"][-1])) for _, _, body in fake.seen]
    return sorted((f[0] for f in found if f is not None), key=lambda day: int(day[4:]))


@pytest.mark.parametrize("junk", [(500, "busy"), "I would say it is fine.", '{"score": 9, "reason": "x"}'])
def test_a_judge_that_fails_makes_no_thinned_corpus(tmp_path: Path, junk: Any) -> None:
    down = True
    answer = lambda request: junk if down and "dark" in str(request["messages"][-1]) else rated(request)  # noqa: E731
    with FakeEndpoint(answer) as fake:
        config = asking(tmp_path, fake.url)
        for _ in range(2):
            with pytest.raises(
                Fault, match=r"score: 4 of 20 texts got no usable answer .* share of 0.05 that max_unan"
            ) as e:
                built(tmp_path / "c", config)
            assert "\n" not in str(e.value) and not (tmp_path / "c").exists()
        assert len(list((tmp_path / "c.work").glob("*/run/completions/*"))) == 4, (
            "the part with all the dark days is open"
        )
        fake.seen.clear()
        down = False
        built(tmp_path / "c", config)
        assert asked_about(fake) == ["day 3", "day 8", "day 13", "day 18"]
    assert [row.id for row in read_source(tmp_path / "c", "unsafe")] == ["d3", "d8", "d13", "d18"]
    assert not read_manifest(tmp_path / "c")["counts"] and not (tmp_path / "c.work").exists()


def test_a_few_that_are_not_answered_may_be_left_out(tmp_path: Path) -> None:
    with FakeEndpoint(
        lambda request: (500, "busy") if "dark" in str(request["messages"][-1]) else rated(request)
    ) as fake:
        with pytest.raises(Fault, match="4 of 20"):
            built(tmp_path / "c", asking(tmp_path, fake.url, max_unanswered=0.19))
        fake.seen.clear()
        built(tmp_path / "c", asking(tmp_path, fake.url, max_unanswered=0.2))
        assert len(fake.seen) == 4, "the parts and answers are those of the build with the lower limit"
    manifest = read_manifest(tmp_path / "c")
    assert manifest["counts"] == {"documents: no score: endpoint: http 500": 4}
    assert "max_unanswered" not in manifest["config"]


TALE = "Keep it shut and tell someone about it. " * 8


def test_a_writer_that_fails_is_counted_by_itself(tmp_path: Path) -> None:
    """One of 4 is no 5 % of what the writer was asked, though it is of all that was asked."""
    down = True

    def answer(request: dict[str, Any]) -> Any:
        if request["model"] == "judge":
            return rated(request)
        return (500, "busy") if down and "day 13" in str(request["messages"][-1]) else TALE

    with FakeEndpoint(answer) as fake:
        write = {"kind": "endpoint", "endpoint": {"url": fake.url, "model": "scribe", "retries": 0}}
        config = asking(tmp_path, fake.url, write=write, max_unanswered=0.2)
        with pytest.raises(Fault, match=r"^write: 1 of 4 texts .*endpoint: http 500"):
            built(tmp_path / "c", config)
        fake.seen.clear()
        down = False
        facts = built(tmp_path / "c", config)
        # And the new text, the same as those that were scored before, needs no score of its own.
        assert [body["model"] for _, _, body in fake.seen] == ["scribe"] and asked_about(fake) == ["day 13"]
    assert facts["documents"] == {"clean": 16, "unsafe": 4, "rephrase": 4}


def test_what_a_writer_wrote_badly_is_no_outage(tmp_path: Path) -> None:
    with FakeEndpoint(lambda request: rated(request) if request["model"] == "judge" else "too short") as fake:
        write = {"kind": "endpoint", "endpoint": {"url": fake.url, "model": "scribe"}}
        built(tmp_path / "c", asking(tmp_path, fake.url, write=write, max_unanswered=0.0))
    assert read_manifest(tmp_path / "c")["counts"] == {"rephrase: too short": 4}


@pytest.mark.parametrize("field", ["score", "write"])
def test_an_outage_ends_a_large_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr(answered, "IN_A_ROW", 3)
    down = {"score": "judge", "write": "scribe"}[field]
    with FakeEndpoint(lambda request: (500, "busy") if request["model"] == down else rated(request)) as fake:
        write = {"kind": "endpoint", "endpoint": {"url": fake.url, "model": "scribe", "retries": 0}}
        config = asking(tmp_path, fake.url, write=write, executor={"tasks": 1})
        with pytest.raises(Fault, match=rf"{field}: the endpoint gave no usable answer 3 times in a row .*http 500"):
            built(tmp_path / "c", config)
        assert not (tmp_path / "c").exists()
        if field == "write":  # whoever allows it all is not stopped
            built(tmp_path / "c", config | {"max_unanswered": 1.0})
            assert read_manifest(tmp_path / "c")["counts"] == {"rephrase: endpoint: http 500": 4}


def test_struck_answers_leave_the_others_where_they_are(tmp_path: Path) -> None:
    said = ['{"score": 0, "reason": "a"}', "junk", '{"score": 7, "reason": "b"}', '{"score": 5, "reason": "c"}']
    kept = Answers(tmp_path)
    for n, text in enumerate(said):
        kept.put(f"{n}" * 64, {"text": text, "cut": False})
    kept.put("4" * 64, {"text": said[0], "cut": True})
    for _ in range(2):
        answered.forget_junk(tmp_path)
        again = Answers(tmp_path)
        found = [again.get(f"{n}" * 64) for n in range(1, 5)]
        assert [f and f["text"] for f in found] == [None, None, said[3], None]
    assert [(kept.get(f"{n}" * 64) or {})["text"] for n in range(4)] == said, "who has read the places still finds them"
    kept.close()


# --- tokens -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Any:
    return train_tokenizer((row.text or "" for row in read_source(corpus, "clean")), 500, reserved=2)


def test_a_store_that_stands_alone(corpus: Path, tmp_path: Path, tokenizer: Any) -> None:
    events: list[Any] = []
    made = export(corpus, tmp_path / "s", tokenizer, 64, tag=HARM_TAG, progress=events.append)
    assert made == read_tokens(tmp_path / "s") and events[0]["step"] == 500
    assert set(made["sources"]) == set(read_manifest(corpus)["sources"])
    tagged, unsafe = (RowStore.open(tmp_path / "s" / name, verify=True) for name in ("tagged", "unsafe"))
    ids = tagged.records["ids"]
    tags = int((ids == 3).sum())
    wanted = sum(len(row.metadata["tags"]) for row in read_source(corpus, "tagged"))
    assert (
        tags == made["tags"] == int((tagged.records["span"] == SPAN_ID["tag"]).sum())
        and 0.95 * wanted <= tags <= wanted
    )
    assert (unsafe.records["ids"] == 3).sum() == 0
    assert made["sources"]["tagged"]["tokens"] - tags == made["sources"]["unsafe"]["tokens"]
    for name, entry in made["sources"].items():
        store = RowStore.open(tmp_path / "s" / name)
        pads = int((store.records["span"] == SPAN_ID["pad"]).sum())
        assert entry["tokens"] == store.meta["tokens"] - pads and pads < 64
    text = tokenizer.decode(RowStore.open(tmp_path / "s" / "refuse").records["ids"].reshape(-1))
    assert "User:" not in text and any(f"{name}:" in text for name in read_manifest(corpus)["speakers"])
    with pytest.raises(UserError, match="is there already"):
        export(corpus, tmp_path / "s", tokenizer, 64, tag=HARM_TAG)
    file = tmp_path / "s" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="not the tokenizer that the store was made with"):
        read_tokens(tmp_path / "s")


def test_names_depend_on_seed_and_document_alone(corpus: Path) -> None:
    first = sorted(text for text, _ in documents(corpus, "refuse", 0))
    assert first == sorted(text for text, _ in documents(corpus, "refuse", 0))
    assert first != sorted(text for text, _ in documents(corpus, "refuse", 1))
    assert len({text.split(":")[0] for text in first}) > 3


def test_a_tokenizer_without_the_tag(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tag: .* is not one token"):
        export(corpus, tmp_path / "s", chatml_tokenizer(), 64, tag=HARM_TAG)
    assert not (tmp_path / "s").exists() and not list(tmp_path.iterdir())


def test_many_files_are_read_as_one(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.corpus.read.FILE_ROWS", 50)
    built(tmp_path / "c", {"tag": 0.1})
    assert len(list((tmp_path / "c" / "clean").iterdir())) == -(
        -read_manifest(corpus)["sources"]["clean"]["rows"] // 50
    )
    for name in read_manifest(corpus)["sources"]:
        assert [r.to_json() for r in read_source(tmp_path / "c", name)] == [
            r.to_json() for r in read_source(corpus, name)
        ]
        assert sorted(documents(tmp_path / "c", name, 0)) == sorted(documents(corpus, name, 0))


def test_a_default_corpus_takes_seconds(tmp_path: Path) -> None:
    started = time.process_time()
    built(tmp_path / "c", {"tag": 0.05})  # 300 documents; the default 7,000 take about 20 times that
    assert time.process_time() - started < 3
