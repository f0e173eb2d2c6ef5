"""The demo: a small language model, its curvature, a suggested learning rate, and whether that was any good."""

from dyntune.demo.page import demo_page as demo_page
from dyntune.demo.tour import DemoResult as DemoResult
from dyntune.demo.tour import Size as Size
from dyntune.demo.tour import tour as tour
