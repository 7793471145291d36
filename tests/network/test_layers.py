"""The product with a weight: in bfloat16 it is added in float32 and rounded once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.layers import product

BFLOAT16_ULP = 2.0**-8  # of a number's size: eight bits of it are kept


def operands(rows: int = 6, width: int = 96, features: int = 10) -> tuple[jax.Array, ...]:
    """x, kernel and a cotangent, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, rows // 2, width), (width, features), (2, rows // 2, features))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def test_a_bfloat16_product_is_the_rounded_sum_of_exact_terms():
    x, kernel, _ = operands()
    found = product(x, kernel)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(found), exact(x) @ exact(kernel), rtol=BFLOAT16_ULP, atol=1e-3)


def test_its_sum_holds_what_bfloat16_could_not():
    """1,000 ones: added in bfloat16 they would stop at 256."""
    assert product(jnp.ones((1, 1000), jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)).item() == 1000


@pytest.mark.parametrize("remat", [False, True])
def test_its_gradients_are_products_of_the_same_kind(remat):
    x, kernel, cotangent = operands()
    _, pull_back = jax.vjp(jax.checkpoint(product) if remat else product, x, kernel)
    dx, dkernel = jax.jit(pull_back)(cotangent)
    assert dx.dtype == dkernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(dx), exact(cotangent) @ exact(kernel).T, rtol=BFLOAT16_ULP, atol=1e-3)
    expected = np.einsum("abw,abf->wf", exact(x), exact(cotangent))
    np.testing.assert_allclose(exact(dkernel), expected, rtol=BFLOAT16_ULP, atol=1e-3)


def test_a_float32_product_is_a_plain_one():
    """What was measured and pinned in float32 has the bits of a product of two matrices."""
    x, kernel, _ = (x.astype(jnp.float32) for x in operands())
    assert np.array_equal(product(x, kernel).reshape(-1, 10), jnp.dot(x.reshape(-1, 96), kernel))


def test_other_platforms_are_asked_for_a_bfloat16_result():
    """Devices that split the width exchange what a product gives: half the bytes."""
    x, kernel, _ = operands()
    traced = jax.jit(product).trace(x, kernel)
    on = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    results = {
        platform: [line.rsplit("->", 1)[1].strip() for line in text.splitlines() if "dot_general" in line]
        for platform, text in on.items()
    }
    assert results == {"cpu": ["tensor<6x10xf32>"], "tpu": ["tensor<6x10xbf16>"]}
