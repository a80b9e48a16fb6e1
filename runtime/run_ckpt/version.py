"""The version of the tool, written into every manifest."""

VERSION = "0.1.0"
