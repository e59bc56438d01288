//! Selection of the built-in handlers by the names of their actions.

use streamer_handler::Handlers;

/// Returns the handlers of the given actions; `*` selects all handlers.
pub(crate) fn select_handlers(all: Handlers, actions: &[String]) -> Result<Handlers, String> {
    if actions.iter().any(|action| action == "*") {
        return Ok(all);
    }
    let names: Vec<_> = all.specs().map(|spec| spec.name.clone()).collect();
    match actions.iter().find(|action| !names.contains(action)) {
        None => Ok(all.only(actions)),
        Some(unknown) => {
            Err(format!("unknown built-in handler {unknown:?}; available: {}", names.join(", ")))
        }
    }
}
