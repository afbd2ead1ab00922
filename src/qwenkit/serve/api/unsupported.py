"""Fields of other servers for the same models: what each is called here, which have no effect, and which are refused.

A field stands in one of three tables. RENAMED is obeyed under another name. WITHOUT_EFFECT is accepted with any value, because it
asks for nothing that this server could do differently. UNSUPPORTED would change the answer: a value that asks for nothing passes,
any other is refused, with or without --strict, in a sentence that says what to use. A field in none of them is left out and told.
"""

from __future__ import annotations

from qwenkit.serve.body import Unsupported

_BUDGET = "max_tokens bounds the thought and the answer together, and enable_thinking: false switches thinking off"
_THOUGHT = (
    "the thought comes apart from the answer, as reasoning_content, and enable_thinking: false switches thinking off"
)
_TEXT_ONLY = "this model reads text only"
_LARK = "use guided_grammar, whose grammars are written in Lark"
_SAMPLING = "use temperature, top_p, top_k or min_p"
_STATE = (
    "this server keeps no conversation; send the whole of it in messages (/v1/responses: in input) with every request"
)
_CODE = "code that comes with a request is not run; use logit_bias or structured_outputs"

BUDGET = Unsupported(_BUDGET, neutral=(-1,), falsy=True)
LOGPROBS = Unsupported("/v1/responses tells no log-probabilities, /v1/chat/completions does (logprobs, top_logprobs)")
THOUGHT_LEFT_OUT = Unsupported(_THOUGHT)

STATE = {
    "previous_response_id": Unsupported(_STATE),
    "conversation": Unsupported(_STATE),
    "container": Unsupported(_STATE),
    "session_params": Unsupported(_STATE),
    # Anthropic's client sends only the new turn once it is accepted, so an empty object is not neutral.
    "thread": Unsupported(f"{_STATE} (Python: tool_runner(..., thread=False))", falsy=True),
}
GENERATION = {
    # vLLM
    "use_beam_search": Unsupported("answers are sampled; n gives several"),
    "include_stop_str_in_output": Unsupported("the stop string that ended an answer is told as stop_reason"),
    "truncate_prompt_tokens": Unsupported("shorten the prompt; POST /tokenize counts its tokens"),
    "bad_words": Unsupported("give their token ids to logit_bias, with -100"),
    "allowed_token_ids": Unsupported("use logit_bias or structured_outputs"),
    "logits_processors": Unsupported(_CODE),
    "prompt_embeds": Unsupported("give the prompt as text or token ids"),
    "guided_whitespace_pattern": Unsupported("blanks between the parts of a value are bounded by the server"),
    "thinking_token_budget": BUDGET,
    "include_reasoning": Unsupported(_THOUGHT, neutral=(True,), falsy=True),
    # SGLang
    "ebnf": Unsupported(_LARK),
    "stop_regex": Unsupported("use stop, whose strings are matched as they are"),
    "no_stop_trim": Unsupported("the stop string that ended an answer is told as stop_reason"),
    "custom_logit_processor": Unsupported(_CODE),
    "separate_reasoning": Unsupported(_THOUGHT, neutral=(True,), falsy=True),
    "stream_reasoning": Unsupported(_THOUGHT, neutral=(True,), falsy=True),
    "lora_path": Unsupported("adapters are loaded by --lora NAME=FOLDER and asked for by that name as model"),
    # llama.cpp
    "grammar": Unsupported(_LARK),
    "mirostat": Unsupported(_SAMPLING),
    "typical_p": Unsupported(_SAMPLING, neutral=(1,)),
    "tfs_z": Unsupported(_SAMPLING, neutral=(1,)),
    "top_n_sigma": Unsupported(_SAMPLING, neutral=(-1,)),
    "xtc_probability": Unsupported(_SAMPLING),
    "dynatemp_range": Unsupported(_SAMPLING),
    "dry_multiplier": Unsupported("use repetition_penalty, frequency_penalty or presence_penalty"),
    "reasoning_budget": BUDGET,
    "thinking_budget_tokens": BUDGET,
    # Qwen's cloud
    "thinking_budget": BUDGET,
    "enable_search": Unsupported("nothing is looked up here; put what was found into a message"),
    "enable_code_interpreter": Unsupported("no code is run here; offer a function in tools"),
    "translation_options": Unsupported("say in a message what to translate, and how"),
    "images": Unsupported(_TEXT_ONLY),
    "audio": Unsupported(_TEXT_ONLY),
    **STATE,
}
CHAT = {
    **GENERATION,
    "chat_template": Unsupported("the server's template is used; --chat-template gives it another one at its start"),
    "documents": Unsupported("put the documents into a message"),
    "echo": Unsupported("answers of a chat do not repeat the prompt"),
}

_HINTS = frozenset(
    (
        *(
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        *("verbosity", "prediction", "priority", "request_id", "guided_decoding_backend", "cache_prompt", "id_slot"),
    )
)
WITHOUT_EFFECT = _HINTS | {"length_penalty", "early_stopping", "spaces_between_special_tokens", "add_special_tokens"}
WITHOUT_EFFECT_OF_MESSAGES = frozenset(("metadata", "service_tier", "cache_control", "betas", "context_management"))
WITHOUT_EFFECT_OF_RESPONSES = frozenset(
    ("client_metadata", "prompt_cache_retention", "store", "service_tier", "include", "top_logprobs", "stream_options")
)

RENAMED = {
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "regex": "guided_regex",
    "json_schema": "guided_json",
    "think": "enable_thinking",
}
