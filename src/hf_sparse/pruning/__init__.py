"""One run over a model: the plan, each layer solved and packed, the report."""
