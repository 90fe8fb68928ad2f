"""The steering step in torch: from the logits of a request's branches to its next token.

`step.py` is the step; `coefficients.py` says how a method becomes numbers, `closed_form.py` why its
optimisation loop is one scalar, `state.py` what is kept of each running request.
"""
