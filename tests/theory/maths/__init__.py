"""The theory of both papers as exact functions of small categorical policies.

Every expectation is a sum over the outcomes, so that a statement is checked to rounding error and
not by sampling. `docs/theory.md` lists which statements hold; the tests beside this folder check
each.
"""
