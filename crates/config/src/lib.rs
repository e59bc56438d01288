//! Configuration of every Streamer process, read once from file, environment and flags
