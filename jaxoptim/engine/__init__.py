"""The owner of parameters, which steps them, for every face.

A :class:`~jaxoptim.engine.store.Store` keeps the values, slots and counts of parameters in slabs, matrices whose rows
belong to parameters, and steps all of them in one compiled call. It knows rules, and nothing of torch or Pyro.
"""
