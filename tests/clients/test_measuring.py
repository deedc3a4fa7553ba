"""Load generators and evaluation harnesses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from model.architecture.folder import PRETRAINED
from tests.clients.conftest import ENVIRONMENT, Run
from tests.model.serving.http.serving import Running

pytestmark = pytest.mark.clients

PROMPTS = ["A fox could not sleep.", "Mia found a key.", "The boat had a secret."]
TOKENS = 20


def test_guidellm_measures_streams(run: Run, service: Running, tmp_path: Path) -> None:
    rows = [f"{prompt},{TOKENS}" for prompt in PROMPTS]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,output_tokens_count", *rows]))
    backend = f"kind=openai_http,target={service.url},model=story-writer"
    for route in ("/v1/completions", "/v1/chat/completions"):
        run(
            "guidellm",
            *("run", "--disable-progress", "--backend", f"{backend},request_format={route}"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=3"),
            *("--data", "kind=csv_file,path=prompts.csv", "--tokenizer", f"kind=hf_auto,model={PRETRAINED}"),
            *("--output", "kind=json,path=out.json"),
            HF_HUB_OFFLINE="1",
            GUIDELLM__MAX_WORKER_PROCESSES="1",
        )
        (benchmark,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
        assert benchmark["metrics"]["request_totals"] == {"successful": 3, "errored": 0, "incomplete": 0, "total": 3}


def test_aiperf_measures_streams(run: Run, service: Running, tmp_path: Path) -> None:
    rows = [json.dumps({"text": prompt, "output_length": TOKENS}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    run(
        "aiperf",
        *("profile", "--model", "story-writer", "--url", service.url, "--endpoint-type", "completions", "--streaming"),
        *("--concurrency", "2", "--request-count", "6", "--input-file", "prompts.jsonl"),
        *("--custom-dataset-type", "single_turn", "--tokenizer", str(PRETRAINED), "--use-server-token-count"),
        *("--output-artifact-dir", "out", "--ui", "none"),
    )
    found = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 6
    assert (found["output_sequence_length"]["min"], found["output_sequence_length"]["max"]) == (TOKENS, TOKENS)


@pytest.mark.skipif(not (ENVIRONMENT / "inference-perf/bin/inference-perf").exists(), reason="it needs Python 3.12")
def test_inference_perf_measures_streams_of_a_given_length(run: Run, service: Running, tmp_path: Path) -> None:
    lengths = {"total_count": 6, "min": TOKENS, "max": TOKENS, "mean": TOKENS, "std_dev": 0}
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {"type": "random", "input_distribution": lengths, "output_distribution": lengths},
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": 3}], "num_workers": 1},
        "server": {"type": "vllm", "model_name": "story-writer", "base_url": service.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(PRETRAINED)},
        "storage": {"local_storage": {"path": "out"}},
    }
    (tmp_path / "config.yml").write_text(json.dumps(config))
    run("inference-perf", "--config_file", "config.yml", HF_HUB_OFFLINE="1")
    summary = json.loads((tmp_path / "out" / "summary_lifecycle_metrics.json").read_text())
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (6, 0)


@pytest.mark.parametrize(("backend", "route"), [("openai", "completions"), ("openai-chat", "chat/completions")])
def test_vllms_benchmark_measures_streams_of_a_given_length(
    run: Run, service: Running, tmp_path: Path, backend: str, route: str
) -> None:
    run(
        "vllm",
        *("bench", "serve", "--backend", backend, "--base-url", service.url, "--endpoint", f"/v1/{route}"),
        *("--model", "story-writer", "--tokenizer", str(PRETRAINED), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(TOKENS), "--random-output-len", str(TOKENS), "--num-prompts", "6"),
        *("--request-rate", "4", "--save-result", "--save-detailed", "--result-filename", "out.json"),
        HF_HUB_OFFLINE="1",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["completed"], found["failed"], found["output_lens"]) == (6, 0, [TOKENS] * 6)


def test_promptfoo_compares_chat_and_completion(run: Run, service: Running, tmp_path: Path) -> None:
    settings = {"apiBaseUrl": f"{service.url}/v1", "apiKey": "none", "max_tokens": TOKENS, "seed": 7}
    check = {"type": "javascript", "value": "output.length > 10"}
    config = {
        "prompts": ["Write a story about {{subject}}"],
        "providers": [{"id": f"openai:{kind}:story-writer", "config": settings} for kind in ("chat", "completion")],
        "tests": [{"vars": {"subject": "a fox named Ember"}, "assert": [check]}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    quiet = {"PROMPTFOO_DISABLE_TELEMETRY": "1", "PROMPTFOO_DISABLE_UPDATE": "1"}
    run("promptfoo", "eval", "-c", "config.json", "--no-cache", "--no-table", "-o", "out.json", **quiet)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (results["stats"]["successes"], results["stats"]["failures"], results["stats"]["errors"]) == (2, 0, 0)
    assert results["stats"]["tokenUsage"]["completion"] == 2 * TOKENS


STORIES = [
    "Once upon a time, there was a fox named Ember. One day, he saw a big, red ball. He was so happy!",
    "Zoë had a café. She made cakes — and tea. The end.",
    'Tom and Mia went to the park. "Look!" said Mia. "A kite!" They ran and ran. Then they went home.',
]
TASK = """task: story_loss
dataset_path: json
dataset_kwargs: {data_files: {test: stories.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}<|endoftext|>"
metric_list: [{metric: bits_per_byte}]
"""


def test_lm_eval_finds_the_bits_per_byte_that_story_evaluate_finds(run: Run, service: Running, tmp_path: Path) -> None:
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    (tmp_path / "story.yaml").write_text(TASK)
    options = f"model=story-writer,base_url={service.url}/v1/completions,tokenizer={PRETRAINED},max_length=4096"
    run(
        "lm_eval",
        *("run", "--model", "local-completions", "--model_args", f"{options},tokenizer_backend=huggingface"),
        *("--batch_size", "2", "--tasks", "story_loss", "--include_path", ".", "--output_path", "out", "--log_samples"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    nats = -sum(float(sample["filtered_resps"][0]) for sample in found)
    size = sum(len(text.encode()) for text in STORIES)
    evaluate = ("evaluate", "--data", "stories.jsonl", "--model", str(PRETRAINED), "--runtime", "native", "--no-write")
    report = json.loads(run(str(ENVIRONMENT.parent / "bin" / "story"), *evaluate, "--no-track", "--json").stdout)
    assert round(nats / math.log(2) / size, 4) == round(report["bits_per_byte"], 4)
