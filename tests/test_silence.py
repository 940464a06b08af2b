"""What would train nothing, or something else than was meant, says so."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxoptim
from jaxoptim import optim
from jaxoptim import pyro as ours_pyro

WAY_OUT = r"loss is a JAX function.*detach\(\)\.numpy\(\).*jaxoptim\.interop\.torch"


class TestParametersOfTorch:
    @pytest.mark.parametrize(
        "given",
        [
            lambda module: module,
            lambda module: module.parameters(),
            lambda module: list(module.parameters()),
            lambda module: module.named_parameters(),
            lambda module: dict(module.named_parameters()),
            lambda module: [{"params": module.parameters()}],
            lambda module: [{"params": list(module.parameters()), "lr": 0.1}],
            lambda module: {"w": torch.zeros(2, requires_grad=True)},
            lambda module: torch.nn.Sequential(module),
        ],
    )
    @pytest.mark.parametrize("kind", [optim.AdamW, optim.LBFGS, optim.SparseAdam], ids=lambda kind: kind.__name__)
    def test_are_refused_with_the_way_out(self, kind, given):
        with pytest.raises(TypeError, match=WAY_OUT) as error:
            kind(given(torch.nn.Linear(2, 1)), lr=0.1)
        assert len(str(error.value)) <= 300

    def test_frozen_ones_too(self):
        frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        with pytest.raises(TypeError, match=f"'w'.*{WAY_OUT}"):
            optim.SGD({"w": frozen})

    def test_wherever_they_arrive(self):
        weight = torch.nn.Parameter(torch.ones(2))
        with pytest.raises(TypeError, match=f"'w'.*{WAY_OUT}"):
            optim.Parameter(weight, "w")
        param = optim.Parameter(np.ones(2))
        with pytest.raises(TypeError, match=WAY_OUT):
            param.value = weight
        with pytest.raises(TypeError, match=WAY_OUT):
            optim.SGD([param]).add_param_group({"params": [weight]})
        with pytest.raises(TypeError, match=WAY_OUT):
            ours_pyro.optim.Adam({"lr": 0.1})([weight])
        with pytest.raises(TypeError, match=WAY_OUT):
            ours_pyro.optim.Adam({"lr": 0.1}).update({"w": weight}, {"w": jnp.ones(2)})

    @pytest.mark.parametrize(
        "start",
        [
            jaxoptim.adam().init,
            jaxoptim.lbfgs().init,
            jaxoptim.pack,
            lambda params: jaxoptim.init(jaxoptim.rules.SGD(), params),
        ],
        ids=["transformation", "lbfgs", "pack", "rule"],
    )
    @pytest.mark.parametrize(
        "given", [lambda module: module, lambda module: dict(module.named_parameters())], ids=["module", "parameters"]
    )
    def test_in_the_pure_face_too(self, start, given):
        with pytest.raises(TypeError, match=f"The parameter '(params|bias)'.*{WAY_OUT}"):
            start(given(torch.nn.Linear(2, 1)))

    def test_the_way_out_is_one(self):
        module = torch.nn.Linear(2, 1)
        opt = optim.SGD({name: p.detach().numpy() for name, p in module.named_parameters()}, lr=0.1)
        opt.step(jax.tree.map(jnp.ones_like, opt.params))
        np.testing.assert_allclose(opt.params["weight"], module.weight.detach().numpy() - 0.1, rtol=1e-6)

    def test_tensors_that_are_data_stay_welcome(self):
        assert optim.SGD({"w": torch.ones(2)}).params["w"].tolist() == [1.0, 1.0]
        opt = optim.SGD({"w": np.ones(2)}, lr=0.5)
        opt.minimize(lambda params, x: jnp.sum(params["w"] * x), torch.tensor([1.0, 2.0]))
        assert opt.params["w"].tolist() == [0.5, 0.0]


WORDS = r"step\(grads\).*minimize\(loss_fn\)"


class TestStepsWithoutGradients:
    def test_warn_once(self):
        opt = optim.AdamW({"w": np.ones(2)})
        with pytest.warns(UserWarning, match=rf"AdamW\.step\(\) did nothing.*{WORDS}") as caught:
            opt.step()
        assert [warning.filename for warning in caught] == [__file__]
        opt.step()
        with pytest.warns(UserWarning, match=WORDS):
            optim.AdamW({"w": np.ones(2)}).step(closure=lambda: 0.0)

    def test_loops_of_torch_are_quiet(self):
        one, other = optim.Parameter(np.ones(2)), optim.Parameter(np.ones(2))
        opt = optim.SGD([one, other])
        one.grad = np.ones(2)
        opt.zero_grad()
        opt.step()  # there was a gradient
        other.grad = np.ones(2)
        opt.step()
        opt.step(closure=lambda: setattr(other, "grad", np.ones(2)))

    def test_a_closure_that_sets_them_is_quiet(self):
        param = optim.Parameter(np.ones(2))
        optim.SGD([param]).step(lambda: setattr(param, "grad", np.ones(2)))

    def test_steps_along_given_gradients_are_quiet(self):
        opt = optim.SGD({"w": np.ones(2)})
        opt.step({"w": None})
        opt.step({"w": np.ones(2)})

    def test_samplers_too(self):
        opt = optim.SGNHT({"w": np.ones(2)}, nbeta=2.0)
        with pytest.warns(UserWarning, match=WORDS):
            opt.step()


SLIPS = {
    "weight_decy": "weight_decay",
    "lrr": "lr",
    "learning_rate": "lr",
    "beta": "betas",
    "b1": "betas",
    "epsilon": "eps",
    "amsgard": "amsgrad",
    "maximise": "maximize",
    "weightdecay": "weight_decay",
}
OWN = (
    "lr_scale",
    "name",
    "initial_lr",
    "fix_lr",
    "layer_id",
    "weight_decay_mult",
    "is_last_layer",
    "steps",
    "momentum",
    3,
)
"""What torch's users keep in groups."""


class TestMisspeltOptions:
    @pytest.mark.parametrize("slip", [*SLIPS, "gradient_transfrom", "master_weight", "froze"])
    def test_constructors_name_the_one_that_is_meant(self, slip):
        meant = SLIPS.get(slip) or {"gradient_transfrom": "gradient_transform", "froze": "frozen"}.get(slip, f"{slip}s")
        match = rf"'{slip}'\. '{meant}' is probably meant\. After params it takes lr, .*state_dtype"
        with pytest.raises(TypeError, match=match):
            optim.AdamW({"w": np.ones(2)}, **{slip: 0.5})

    @pytest.mark.parametrize("slip", [*SLIPS, "momentum", "lr_scale", "name"])
    def test_selected_groups_take_options_only(self, slip):
        meant = f"and '{SLIPS[slip]}' is probably meant" if slip in SLIPS else f"'{slip}' is no option of AdamW"
        with pytest.raises(TypeError, match=rf"{meant}.*It takes lr, betas, eps, weight_decay, "):
            optim.AdamW({"w": np.ones(2), "b": np.ones(2)}, groups=[("b", {slip: 0.5})])

    @pytest.mark.parametrize("slip", SLIPS)
    def test_group_dicts_refuse_slips(self, slip):
        match = rf"'{slip}', which is no option of AdamW.*'{SLIPS[slip]}' is probably meant"
        with pytest.raises(TypeError, match=match):
            optim.AdamW([{"params": [np.ones(2)], slip: 0.5}])
        opt = optim.AdamW([np.ones(2)])
        with pytest.raises(TypeError, match=match):
            opt.add_param_group({"params": [np.ones(2)], slip: 0.5})
        assert len(opt.param_groups) == 1
        opt.step([np.ones(2)])
        before = np.asarray(opt.params[0])
        opt.param_groups[0][slip] = 0.5
        for _ in range(2):
            with pytest.raises(TypeError, match=match):
                opt.step([np.ones(2)])
        with pytest.raises(TypeError, match=match):
            opt.minimize(lambda params: jnp.sum(params[0] ** 2))
        np.testing.assert_array_equal(opt.params[0], before)
        del opt.param_groups[0][slip]
        opt.step([np.ones(2)])

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD, optim.Rprop, optim.Adafactor], ids=lambda x: x.__name__)
    def test_keys_of_the_users_own_stay_as_in_torch(self, kind):
        own = dict.fromkeys([key for key in OWN if key not in kind([1.0]).defaults], 7.0)
        parent = getattr(torch.optim, kind.__name__)([{"params": [torch.zeros(2)], **own}])
        opt = kind([{"params": {"w": np.ones(2)}, **own}])
        opt.param_groups[0]["note"] = "mine"
        opt.step([{"w": np.ones(2)}])
        assert (
            {key: opt.param_groups[0][key] for key in own} == {key: parent.param_groups[0][key] for key in own} == own
        )

    @pytest.mark.slow
    def test_every_option_is_its_own(self):
        """No class refuses an option of its own, nor one that a scheduler adds."""
        for name in ("SGD", "AdamW", "Rprop", "ASGD", "Adadelta", "NAdam", "RMSprop", "ClippedAdam", "DCTAdam"):
            first = getattr(optim, name)({"w": np.ones((2, 2))})
            options = {key: value for key, value in first.param_groups[0].items() if key != "params"}
            opt = getattr(optim, name)({"w": np.ones((2, 2))}, groups=[("w", options | {"initial_lr": 0.1})])
            opt.step({"w": np.ones((2, 2))})

    def test_a_copy_checks_too(self):
        opt = copy.deepcopy(optim.SGD([np.ones(2)]))
        opt.param_groups[0]["lrr"] = 1.0
        with pytest.raises(TypeError, match="'lr' is probably meant"):
            opt.step([np.ones(2)])

    def test_options_of_pyro_style_optimizers(self):
        loc = {"loc": jnp.ones(2)}
        with pytest.raises(TypeError, match=r"'loc'.*learning_rate.*it takes lr, betas"):
            ours_pyro.optim.Adam({"learning_rate": 0.1}).update(loc, loc)
        optimizer = ours_pyro.optim.Adam({"lr": 0.1})
        params = optimizer.update(loc, loc)
        optimizer.optim_objs["loc"].param_groups[0]["weight_decy"] = 0.1
        with pytest.raises(TypeError, match="'weight_decay' is probably meant"):
            optimizer.update(params, loc)


def barrier(x):
    """Least at 1, NaN below zero, where its slope is finite all the same."""
    return jnp.sum(x - jnp.log(x))


def by_closure(opt, param):
    def closure():
        value, param.grad = jax.value_and_grad(barrier)(param.value)
        return value

    return opt.step(closure)


def barrier_of_first(params):
    return barrier(params[0])


def by_minimize(opt, param):
    return opt.minimize(barrier_of_first)


class TestLBFGSWhereTheLossTurnsNaN:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", [by_closure, by_minimize])
    @pytest.mark.parametrize("max_iter", [1, 2, 20])
    def test_goes_on_from_the_last_finite_point(self, x64, step, max_iter):
        param = optim.Parameter(jnp.array([0.01, 5.0]))
        opt = optim.LBFGS([param], max_iter=max_iter)
        caught = []
        for _ in range(60):
            with warnings.catch_warnings(record=True) as new:
                warnings.simplefilter("always")
                step(opt, param)
            caught += new
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(opt.state_dict()["state"]) if x is not None)
            if max_iter > 2:
                assert jnp.isfinite(barrier(param.value))
        (warning,) = caught
        assert "last point where it was finite" in str(warning.message)
        assert warning.filename == __file__
        np.testing.assert_allclose(param.value, 1.0, atol=1e-4)

    def test_ends_where_the_loss_was_finite(self, x64):
        param = optim.Parameter(jnp.array([0.01, 5.0]))
        opt = optim.LBFGS([param])
        with pytest.warns(UserWarning, match="strong_wolfe"):
            opt.minimize(lambda xs: barrier(xs[0]))
        # As torch's step does that has no time for the evaluation that spoils it.
        tensor = torch.nn.Parameter(torch.tensor([0.01, 5.0], dtype=torch.float64))
        parent = torch.optim.LBFGS([tensor], max_iter=2, max_eval=10)

        def closure():
            parent.zero_grad()
            value = torch.sum(tensor - torch.log(tensor))
            value.backward()
            return value

        parent.step(closure)
        np.testing.assert_allclose(param.value, tensor.detach().numpy(), rtol=1e-12)
        assert float(opt.state[param]["prev_loss"]) == pytest.approx(float(barrier(param.value)))

    @pytest.mark.slow
    def test_of_the_pure_face_too(self):
        tx, x = jaxoptim.lbfgs(), jnp.array([0.01, 5.0])

        @jax.jit
        def step(x, state):
            updates, state = tx.update(jax.grad(barrier)(x), state, x, value_fn=barrier)
            return x + updates, state

        state = tx.init(x)
        for _ in range(60):
            x, state = step(x, state)
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((x, state)))
        np.testing.assert_allclose(x, 1.0, atol=1e-3)

    @pytest.mark.slow
    def test_a_loss_that_is_nan_from_the_start_stays_where_it_is(self):
        for search in (None, "strong_wolfe"):
            rule, x = jaxoptim.rules.LBFGS(line_search_fn=search), jnp.ones(3)
            _, after, state = rule.minimize(lambda x: (jnp.nan, 2 * x), x, rule.init(x))
            np.testing.assert_array_equal(after, x)
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
