"""Libraries that applications are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model.serving.backend import LocalBackend
from model.settings import Settings
from tests.clients.conftest import Run
from tests.demo.served import serve

pytestmark = pytest.mark.clients

FOX = "A fox could not sleep."
INSTRUCTION = "Write a story about a fox named Ember"
MADE = "Once upon a time, there was a fox named Ember."
SETTINGS = {"max_tokens": 20, "seed": 7}
Script = Callable[..., Any]
Story = Callable[..., str]


def test_litellm_chats_streams_and_completes_lists_of_prompts(python: Script, story: Story) -> None:
    result = python(
        """
import litellm
chat = dict(model="openai/story-writer", api_base=BASE, api_key="none", max_tokens=20, seed=7)
def said(text):
    return [{"role": "user", "content": text}]
whole = litellm.completion(messages=said("Write a story about a fox named Ember"), **chat)
stream = litellm.completion(messages=said("A fox could not sleep."), stream=True, **chat)
batch = litellm.batch_completion(messages=[said("A fox could not sleep."), said("Mia found a key.")], **chat)
text = litellm.text_completion(**chat | {"model": "text-completion-openai/story-writer"}, prompt=["A fox", "Mia"])
result = {
    "whole": whole.choices[0].message.content,
    "tokens": whole.usage.completion_tokens,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "batch": [answer.choices[0].message.content for answer in batch],
    "text": [choice.text for choice in text.choices],
}
""",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert result == {
        "whole": MADE + story(MADE, **SETTINGS),
        "tokens": 20,
        "stream": story(FOX, **SETTINGS),
        "batch": [story(FOX, **SETTINGS), story("Mia found a key.", **SETTINGS)],
        "text": [story("A fox", **SETTINGS), story("Mia", **SETTINGS)],
    }


def test_langchain_runs_llm_and_chat_model_whole_streamed_and_in_batches(python: Script, story: Story) -> None:
    result = python(
        """
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
settings = dict(base_url=BASE, api_key="none", model="story-writer", max_tokens=20, seed=7)
llm, chat = OpenAI(**settings), ChatOpenAI(**settings)
result = {
    "llm": llm.invoke("A fox"),
    "generated": [found[0].text for found in llm.generate(["A fox", "Mia"]).generations],
    "llm_stream": "".join(llm.stream("A fox")),
    "llm_batch": llm.batch(["A fox", "Mia"]),
    "chat": chat.invoke("Write a story about a fox named Ember").content,
    "chat_stream": "".join(chunk.text for chunk in chat.stream("A fox could not sleep.")),
    "chat_batch": [message.content for message in chat.batch(["A fox could not sleep.", "Mia"])],
    "continued": chat.invoke(
        [SystemMessage("Be brief."), HumanMessage("A fox could not sleep."), AIMessage(" He"), HumanMessage("Go on")]
    ).content,
}
"""
    )
    # LangChain's LLM sends defaults of its own.
    fox, mia = (story(prompt, temperature=0.7, top_p=1, **SETTINGS) for prompt in ("A fox", "Mia"))
    assert result == {
        "llm": fox,
        "generated": [fox, mia],
        "llm_stream": fox,
        "llm_batch": [fox, mia],
        "chat": MADE + story(MADE, **SETTINGS),
        "chat_stream": story(FOX, **SETTINGS),
        "chat_batch": [story(FOX, **SETTINGS), story("Mia", **SETTINGS)],
        "continued": story(f"{FOX} He", **SETTINGS),
    }


def test_the_llm_command_chats_continues_and_completes(run: Run, service: Any, story: Story, tmp_path: Any) -> None:
    entry = "- {{model_id: {0}, model_name: story-writer, api_base: '{1}/v1', completion: {2}}}\n"
    text = entry.format("chat", service.url, "false") + entry.format("text", service.url, "true")
    (tmp_path / "extra-openai-models.yaml").write_text(text)

    def llm(*arguments: str) -> str:
        options = ("-o", "max_tokens", "20", "-o", "seed", "7")
        return run("llm", *arguments, *options, LLM_USER_PATH=str(tmp_path)).stdout.rstrip("\n")

    first = llm("-m", "chat", "-s", "You are a pirate", INSTRUCTION)
    assert first == MADE + story(MADE, **SETTINGS)
    assert llm("-c", "Continue") == story(first, **SETTINGS)
    assert llm("-m", "text", FOX) == llm("-m", "text", "--no-stream", FOX) == story(FOX, **SETTINGS)


def test_openais_javascript_client_chats_streams_and_completes(node: Script, story: Story) -> None:
    result = node(
        """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: BASE, apiKey: "none" });
const messages = [{ role: "user", content: "A fox could not sleep." }];
const asked = { model: "story-writer", messages, max_tokens: 20 };
const drawn = await client.chat.completions.create(asked);
const again = await client.chat.completions.create({ ...asked, seed: drawn.choices[0].seed });
let stream = "";
for await (const chunk of await client.chat.completions.create({ ...asked, seed: 7, stream: true }))
    stream += chunk.choices[0]?.delta?.content ?? "";
const settings = { model: "story-writer", max_tokens: 20, seed: 7 };
const text = await client.completions.create({ ...settings, prompt: ["A fox", "Mia"] });
const models = await client.models.list();
const result = {
    same: drawn.choices[0].message.content === again.choices[0].message.content,
    stream,
    text: text.choices.map(choice => choice.text),
    models: models.data.map(model => model.id),
};
"""
    )
    assert result == {
        "same": True,
        "stream": story(FOX, **SETTINGS),
        "text": [story("A fox", **SETTINGS), story("Mia", **SETTINGS)],
        "models": ["story-writer"],
    }


def test_vercels_ai_sdk_generates_and_streams_chats_and_completions(node: Script, story: Story) -> None:
    result = node(
        """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const provider = createOpenAICompatible({ name: "story", baseURL: BASE, apiKey: "none", includeUsage: true });
const asked = { prompt: "Write a story about a fox named Ember", maxOutputTokens: 20, seed: 7 };
const whole = await generateText({ model: provider("story-writer"), ...asked });
const stream = streamText({ model: provider("story-writer"), ...asked });
let text = "";
for await (const part of stream.textStream) text += part;
const usage = await stream.usage;
const tokens = [whole.usage.outputTokens, usage.outputTokens];
const result = { whole: whole.text, text, reason: whole.finishReason, tokens };
"""
    )
    expected = MADE + story(MADE, **SETTINGS)
    assert result == {"whole": expected, "text": expected, "reason": "length", "tokens": [20, 20]}


def test_openapi_typescript_makes_types_of_the_description(run: Run, service: Any, tmp_path: Any) -> None:
    run("openapi-typescript", f"{service.url}/openapi.json", "-o", "api.d.ts")
    types = (tmp_path / "api.d.ts").read_text()
    for name in ("CompletionBody", "ChatBody", "SimpleBody", "ChatResponse", "ErrorResponse"):
        assert f"{name}: {{" in types


def test_gradios_javascript_client_streams_the_pages_endpoints(node: Script, story: Story) -> None:
    with serve(LocalBackend.load(Settings())) as page:
        result = node(
            f"""
            import {{ Client }} from "@gradio/client";
            const app = await Client.connect({page.url!r});
            const story = async (endpoint, prompt) => {{
              const parts = [];
              for await (const event of app.submit(endpoint, {{ prompt, max_tokens: 20, seed: 7 }})) {{
                if (event.type === "data") parts.push(event.data[0]);
              }}
              return parts.at(-1);
            }};
            const begun = await story("/write", {FOX!r});
            const more = await story("/continue", begun.story);
            const failed = await app.predict("/write", {{ prompt: "", max_tokens: 0 }}).catch((error) => error.message);
            setTimeout(() => process.exit(0), 0); // its connection to the page would keep Node running
            const result = {{ begun, more, failed }};
            """
        )
    begun, more = result["begun"], result["more"]
    assert begun["text"] == story(FOX, **SETTINGS)
    assert (begun["story"], begun["finish_reason"], begun["seed"]) == (FOX + begun["text"], "length", 7)
    assert more["story"] == begun["story"] + story(begun["story"], **SETTINGS)
    assert "between 1 and" in result["failed"]
