//! Streamer's test suites
