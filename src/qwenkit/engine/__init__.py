"""The life of a request: request, blocks, scheduler, batch, runner, sampler, engine, llm. Imports weights and below."""
