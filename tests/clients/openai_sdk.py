"""Drives a running server through the OpenAI Python SDK. Usage: openai_sdk.py BASE_URL MODEL"""

import sys

import openai

base_url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
question = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "The capital of France is"},
]

assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

chat = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=32)
text = chat.choices[0].message.content
assert "Paris" in text, text
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
assert chat._request_id

stream = client.chat.completions.create(
    model=model, messages=question, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert streamed == text, (streamed, text)
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].choices == [] and chunks[-1].usage == chat.usage.model_copy(
    update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
)

several = client.chat.completions.create(
    model=model, messages=question, n=3, max_tokens=8, temperature=0.9, seed=1, logprobs=True, top_logprobs=2
)
assert sorted(c.index for c in several.choices) == [0, 1, 2]
assert all(len(t.top_logprobs) == 2 for c in several.choices for t in c.logprobs.content)

legacy = client.completions.create(model=model, prompt=["Once upon", "In the"], max_tokens=8, temperature=0, logprobs=1)
assert [c.index for c in legacy.choices] == [0, 1]
assert all(len(c.logprobs.tokens) == len(c.logprobs.token_logprobs) for c in legacy.choices)

with client.chat.completions.create(model=model, messages=question, max_tokens=2000, stream=True) as partial:
    next(iter(partial))

for call, error in [
    (lambda: client.chat.completions.create(model="nobody", messages=question), openai.NotFoundError),
    (lambda: client.chat.completions.create(model=model, messages=[]), openai.BadRequestError),
    (lambda: client.chat.completions.create(model=model, messages=question, temperature=-1), openai.BadRequestError),
]:
    try:
        call()
    except error as e:
        assert e.body["message"], e
    else:
        raise AssertionError(f"expected {error.__name__}")

print("openai", openai.__version__, "ok:", repr(text))
