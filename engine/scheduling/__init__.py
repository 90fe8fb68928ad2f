"""Which tokens the next step computes, and which blocks of the KV cache they go to."""
