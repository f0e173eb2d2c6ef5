"""Records as one self-contained HTML page. Importing this loads matplotlib and jinja2."""

from dyntune.report.html import render as render
from dyntune.report.html import write as write
from dyntune.report.monitored import RunPage as RunPage
from dyntune.report.monitored import run_page as run_page
from dyntune.report.page import FigureBlock as FigureBlock
from dyntune.report.page import Page as Page
from dyntune.report.page import Section as Section
from dyntune.report.page import Table as Table
from dyntune.report.sections import density_section as density_section
from dyntune.report.sections import eigenvalues_section as eigenvalues_section
from dyntune.report.sections import recommendation_section as recommendation_section
