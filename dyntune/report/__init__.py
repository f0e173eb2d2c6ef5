"""Records as one self-contained HTML page. Importing this loads matplotlib and jinja2."""

from dyntune.report.page import FigureBlock as FigureBlock
from dyntune.report.page import Page as Page
from dyntune.report.page import Section as Section
from dyntune.report.page import Table as Table
from dyntune.report.page import render as render
from dyntune.report.page import write as write
from dyntune.report.sections import density_section as density_section
from dyntune.report.sections import eigenvalues_section as eigenvalues_section
from dyntune.report.sections import recommendation_section as recommendation_section
