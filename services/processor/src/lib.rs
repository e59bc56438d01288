//! Execution: claim, dispatch to handlers, retry, time out
