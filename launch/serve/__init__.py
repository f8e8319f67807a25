"""A trained model behind HTTP: OpenAI's completions, and a page to try it."""
