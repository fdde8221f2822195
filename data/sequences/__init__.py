"""From rows to the sequences of tokens that the encoder sees, single, paired or masked, tokenised once and cached.
`tokens` is the way in and `split.TokenisedSplit` what comes out; what is random in an example is drawn by `draw`.
"""
