"""A beta-VAE on scikit-learn's handwritten digits, a model of numpyro trained by ``jaxoptim.pyro.infer.SVI``.

Run ``python examples/beta_vae_digits.py --help`` for the options. The divergence of the guide from the prior is
weighted by beta: ``numpyro.handlers.scale`` around the latent variable, in the model and in the guide. A larger beta
leaves less of each image in its code: the images come back worse, and the codes are closer to the prior. A figure
shows test images, what each beta gives back of them, and images from codes of the prior.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.infer import TraceMeanField_ELBO

from digits import OneLineParser, load_data, shuffled
from jaxoptim import pyro
from jaxoptim.pyro.infer import SVI

BETAS = (1.0, 4.0)
PIXELS, HIDDEN, CODE = 64, 128, 8
NOISE = 0.25
"""The standard deviation of a pixel, whose values are from 0 to 1."""

SHOWN = 12


# The model -----------------------------------------------------------------------------------------------


def layer(name: str, x: jax.Array, size: int) -> jax.Array:
    def init(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (x.shape[-1], size)) * x.shape[-1] ** -0.5

    return x @ numpyro.param(f"{name}.weight", init) + numpyro.param(f"{name}.bias", jnp.zeros(size))


def decode(z: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(layer("decoder.output", jax.nn.relu(layer("decoder.hidden", z, HIDDEN)), PIXELS))


def encode(x: jax.Array) -> dist.Distribution:
    hidden = jax.nn.relu(layer("encoder.hidden", x, HIDDEN))
    scale = jax.nn.softplus(layer("encoder.scale", hidden, CODE))
    return dist.Normal(layer("encoder.loc", hidden, CODE), scale).to_event(1)


PRIOR = dist.Normal(jnp.zeros(CODE), 1.0).to_event(1)


def model(images: jax.Array, beta: float) -> None:
    with numpyro.plate("images", len(images)):
        with handlers.scale(scale=beta):
            z = numpyro.sample("z", PRIOR)
        numpyro.sample("pixels", dist.Normal(decode(z), NOISE).to_event(1), obs=images)


def guide(images: jax.Array, beta: float) -> None:
    with numpyro.plate("images", len(images)), handlers.scale(scale=beta):
        numpyro.sample("z", encode(images))


# Training ------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a training has come to, on the test images."""

    error: float  # the sum of the squared errors of an image's pixels, mean over the images
    divergence: float  # of the guide's code from the prior, mean over the images
    reconstructions: np.ndarray
    samples: np.ndarray


def train(beta: float, train_images: jax.Array, test_images: jax.Array, epochs: int) -> Result:
    rng = np.random.default_rng(0)
    steps = epochs * len(shuffled(rng, len(train_images)))
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO(), key=jax.random.key(0))
    for _ in range(epochs):
        for batch in shuffled(rng, len(train_images)):
            svi.step(train_images[batch], beta)
    params = svi.get_params()
    posterior = handlers.substitute(encode, params)(test_images)
    decoder = handlers.substitute(decode, params)
    reconstructions = decoder(posterior.mean)
    return Result(
        error=float(jnp.mean(jnp.sum((reconstructions - test_images) ** 2, axis=-1))),
        divergence=float(jnp.mean(dist.kl_divergence(posterior, PRIOR))),
        reconstructions=np.asarray(reconstructions),
        samples=np.asarray(decoder(PRIOR.sample(jax.random.key(1), (SHOWN,)))),
    )


# The command ---------------------------------------------------------------------------------------------


def plot(images: jax.Array, results: dict[float, Result], path: Path) -> None:
    rows = {"test images": images}
    rows |= {f"back, beta = {beta:g}": result.reconstructions for beta, result in results.items()}
    rows |= {f"prior, beta = {beta:g}": result.samples for beta, result in results.items()}
    figure = Figure(figsize=(9, 4.0))
    for axes, (name, row) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        tiles = [np.pad(np.reshape(image, (8, 8)), 1) for image in row[:SHOWN]]
        axes.imshow(np.concatenate(tiles, axis=1), cmap="gray_r", vmin=0, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=0.17, right=0.99, top=0.98, bottom=0.02, hspace=0.08)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_epochs(default=60)
    parser.add_out()
    arguments = parser.parse_args()
    parser.make_directory(arguments.out)
    data = load_data()

    print(f"{'beta':>4}{'squared error of an image':>28}{'KL of an image':>17}")
    results = {}
    for beta in BETAS:
        results[beta] = result = train(beta, data.train_images, data.test_images, arguments.epochs)
        print(f"{beta:>4g}{result.error:>28.3f}{result.divergence:>17.3f}")
    path = arguments.out / "beta_vae.png"
    plot(data.test_images, results, path)
    print(f"The images are in {path}.")


if __name__ == "__main__":
    main()
