"""The steering step in torch: from the logits of a request's branches to its next token.

`step.py` is the step; `coefficients.py` represents a method as numbers, `closed_form.py` reduces its
optimisation loop to one scalar, and `state.py` stores the state of each running request.
"""
