//! The commands of the streamer binary that talk to a server
