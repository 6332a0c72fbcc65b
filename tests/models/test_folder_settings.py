"""A base model's folder decides no greedy answer by settings or by the day: evaluate, ask, web and exports are alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient
from transformers import AutoModelForImageTextToText

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.data.chat import DATE
from mslora_cr.data.images import load_image
from mslora_cr.models.processor_base import load_processor
from mslora_cr.serving.web import make_app
from tests.conftest import write_config
from tests.helpers.families import make

DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"


def answers(results: Path) -> list[str]:
    lines = (results / "tiny" / "pathvqa" / "answer-file.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_settings_and_dates_in_a_folder_decide_nothing(
    tmp_path: Path, tiny_settings: dict[str, Any], tiny_data: Path, capsys: Any
) -> None:
    plain, edited = tmp_path / "plain", tmp_path / "edited"
    make("qwen2_5_vl", plain)
    template = plain / "chat_template.jinja"
    template.write_text(DATED + template.read_text())
    settings = {
        **tiny_settings,
        "method": "each",
        "model": {**tiny_settings["model"], "path": str(plain)},
        "tasks": tiny_settings["tasks"][:1],
    }
    config = str(write_config(tmp_path, settings))
    assert main(["train", config]) == 0 and main(["evaluate", config]) == 0
    ledger = json.loads((tmp_path / "checkpoints" / "tiny" / "ledger.json").read_text())
    assert ledger["tasks"]["pathvqa"]["template_date"] == DATE.date().isoformat()
    image = next((tiny_data / "PathVQA").rglob("*.png"))
    wanted = mslora_cr.load(config, task="pathvqa").ask(image, "is this a cell?")

    shutil.copytree(plain, edited)
    generation = json.loads((edited / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 1.6, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "do_sample": True}
    generation |= {"suppress_tokens": list(wanted.ids), "begin_suppress_tokens": [wanted.ids[0]]}
    generation |= {"num_beams": 3, "temperature": 0.7, "top_k": 1, "bad_words_ids": [[wanted.ids[0]]]}
    other_id = next(number for number in range(9) if number not in wanted.ids)
    generation |= {"forced_eos_token_id": other_id, "stop_strings": [wanted.text[:1] or " "]}
    (edited / "generation_config.json").write_text(json.dumps(generation))
    other = f"model.path={edited}"

    assert main(["evaluate", config, other, f"results_dir={tmp_path / 'again'}"]) == 0
    assert answers(tmp_path / "again") == answers(tmp_path / "results")
    ours = mslora_cr.load(config, task="pathvqa", overrides=[other])
    assert ours.ask(image, "is this a cell?").ids == wanted.ids
    client = TestClient(make_app(ours, ["127.0.0.1"]), base_url="http://127.0.0.1")
    form = {"question": "is this a cell?", "stages": "1", "task": "pathvqa"}
    reply = client.post("/api/ask", data=form, files={"image": ("x.png", image.read_bytes())}).json()
    assert [answer["text"] for answer in reply["answers"]] == [wanted.text]

    adapters = ["export", config, other, "--format", "peft", "--output", str(tmp_path / "adapters")]
    assert main([*adapters, "--base", "owner/name"]) == 0
    said = capsys.readouterr().err
    assert "has repetition_penalty, num_beams, no_repeat_ngram_size, min_new_tokens, suppress_tokens" in said
    assert "forced_eos_token_id" in said and "stop_strings, do_sample. Ask without these settings" in said
    assert main(["export", config, other, "--format", "merged", "--output", str(tmp_path / "out")]) == 0
    [folder] = (tmp_path / "out").iterdir()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert (folder / "chat_template.jinja").read_text().startswith("{% macro strftime_now")
    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "is this a cell?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert f"Today: {DATE:%d %b %Y}" in text
    inputs = processor(text=[text], images=[load_image(image)], return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=len(wanted.ids))[0, inputs["input_ids"].shape[1] :]
    assert found.tolist() == list(wanted.ids)

    capsys.readouterr()
    assert main(["model", "inspect", str(edited)]) == 0
    assert json.loads(capsys.readouterr().out)["template_date"] == DATE.date().isoformat()
