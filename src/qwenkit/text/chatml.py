"""ChatML as a template, for models that come without one: base models that learn to converse.

The control tokens <|im_start|> and <|im_end|> must be in the vocabulary, as they are in every Qwen's.
"""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's: a conversation that begins without a system message gets this one.
QWEN_SYSTEM = "You are a helpful assistant."
QWEN = (
    "{% if messages and messages[0].role != 'system' %}<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n{% endif %}"
) + CHATML

NAMED = {"chatml": CHATML, "qwen": QWEN}
