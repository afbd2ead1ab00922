"""The routes that applications call: chat, completions, tokens, Anthropic's messages and OpenAI's responses."""
