//! Every service in one process: the streamer binary
