"""The one differentiable number that says how safe a model is. Higher is safer."""
