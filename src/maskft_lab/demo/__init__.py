"""A real small language model and a generated task: all that `maskft demo` needs, without a model hub."""
