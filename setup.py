"Package metadata lives in settings.ini; this file only hands it to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("papers", "explain", "export")}
extras["dev"] = sum(extras.values(), []) + cfg["dev_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Natural Language :: English",
        *(f"Programming Language :: Python :: 3.{v}" for v in (10, 11, 12, 13)),
    ],
    python_requires=f">={cfg['min_python']}",
    # the tables of `data/` travel inside the package, as `segkern/_data`
    packages=find_packages(include=["segkern", "segkern.*"]) + ["segkern._data"],
    package_dir={"segkern": "segkern", "segkern._data": "data"},
    package_data={
        "segkern": ["py.typed"],
        "segkern._data": ["*.json", "*.css", "*/*.json", "*/*.csv"],
    },
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["segkern=segkern.cli:main"],
        "nbdev": ["segkern=segkern._modidx:d"],
    },
    zip_safe=False,
)
