"""Answers questions with transformers and PEFT alone, as anybody would who has never heard of this project.

`python answers_elsewhere.py CASES.json IDS.json`; a case names a model's folder, perhaps an adapter's, images, a question.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModel, PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

loaded = {}
found = []
for case in json.loads(Path(sys.argv[1]).read_text()):
    key = case["model"], case.get("adapter")
    if key not in loaded:
        if case.get("auto"):  # the adapter says what its base model is
            model = AutoPeftModel.from_pretrained(case["adapter"])
        else:
            model, report = LlavaForConditionalGeneration.from_pretrained(case["model"], output_loading_info=True)
            assert not any(report.values()), report
            if case.get("adapter"):
                model = PeftModel.from_pretrained(model, case["adapter"])
        if case.get("adapter"):
            adapted = {name for name, module in model.named_modules() if name.endswith("lora_A")}
            assert adapted and all("language_model" in name for name in adapted)
        loaded[key] = model.eval(), AutoProcessor.from_pretrained(case["model"])
    model, processor = loaded[key]
    texts = [text for exchange in case.get("history", []) for text in exchange] + [case["question"]]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(texts)
    ]
    messages[0]["content"] = [{"type": "image"} for _ in case["images"]] + messages[0]["content"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [Image.open(path).convert("RGB") for path in case["images"]]
    inputs = processor(text=prompt, images=pictures, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=case["tokens"], do_sample=False)
    found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
assert not any(name.startswith("mslora_cr") for name in sys.modules)
Path(sys.argv[2]).write_text(json.dumps(found))
