"""SM2 written down a second time, in plain integers, for tests to check against."""

import pytest

from hsmwrap.sm2 import open_engine
from hsmwrap.sm2.curve import GX, GY, A, B, P


class Reference:
    """Affine arithmetic on the curve; slow, leaky, and independent of every engine."""

    G = (GX, GY)

    @staticmethod
    def add(left, right):
        if left is None or right is None:
            return left or right
        if left[0] == right[0] and left != right:
            return None
        if left == right:
            slope = (3 * left[0] ** 2 + A) * pow(2 * left[1], -1, P)
        else:
            slope = (right[1] - left[1]) * pow(right[0] - left[0], -1, P)
        x = (slope**2 - left[0] - right[0]) % P
        return x, (slope * (left[0] - x) - left[1]) % P

    def multiply(self, scalar, point):
        product = None
        for bit in f"{scalar:b}":
            product = self.add(product, product)
            if bit == "1":
                product = self.add(product, point)
        return product

    @staticmethod
    def point_from(x, accept=lambda x, y: True):
        """The first acceptable point at or after x, found by Fermat, not by recover_y."""
        while True:
            right = (x**3 + A * x + B) % P
            if pow(right, (P - 1) // 2, P) == 1:
                root = pow(right, (P + 1) // 4, P)
                for y in (root, P - root):
                    if accept(x, y):
                        return x, y
            x += 1


@pytest.fixture(scope="session")
def reference():
    return Reference()


@pytest.fixture(scope="session", params=["libcrypto", "gmssl"])
def engine(request):
    return open_engine(request.param)


@pytest.fixture(scope="session")
def libcrypto():
    return open_engine("libcrypto")
