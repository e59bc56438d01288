//! Handlers that people can copy
