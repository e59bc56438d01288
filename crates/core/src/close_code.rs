//! Close codes of WebSocket connections: the only list of them in Rust.
//!
//! Sources: RFC 6455 section 7.4.1 and the IANA "WebSocket Close Code Number Registry" for codes below 3000; codes from
//! 4000 are for private use (RFC 6455 section 7.4.2) and belong to subprotocol `streamer.v1.json`. To add a code, add a
//! variant, its row in `CloseCode::row`, and an entry in [`CloseCode::ALL`]; and extend the lists of the Python client
//! (`_websocket/connection.py`) and of the TypeScript client (`websocket-connection.js`, `errors.js`).

use std::fmt;

use crate::ErrorCode;

/// Close code of a WebSocket connection. Received numbers are converted with `From<u16>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseCode {
    /// 1000 (RFC 6455): The connection is no longer needed. The gateway confirms a client's close frame without a code
    /// with it.
    Normal,
    /// 1001 (RFC 6455): The gateway is shutting down, or the user left the page.
    GoingAway,
    /// 1002 (RFC 6455): A frame violates the WebSocket protocol.
    ProtocolError,
    /// 1003 (RFC 6455): The type of a message is not supported. The gateway does not send it.
    UnsupportedData,
    /// 1005 (RFC 6455): The close frame contains no code. It is never sent.
    NoStatus,
    /// 1007 (RFC 6455): A text message is not UTF-8.
    InvalidPayload,
    /// 1008 (RFC 6455): A message was not completed within `gateway.message_timeout`, or an operator closed the
    /// connection (`ConnectionsService.Disconnect`).
    PolicyViolation,
    /// 1009 (RFC 6455): A message exceeds the limit that `connected` announces as `max_message_bytes`.
    MessageTooBig,
    /// 1013 (IANA registry): The server cannot verify the token now, because it cannot reach its signing keys
    /// (docs/adr/0023).
    TryAgainLater,
    /// 4400: The requested subprotocol is not supported, or too many consecutive messages were invalid.
    InvalidRequest,
    /// 4401: The token is missing or invalid, or it expired (docs/security.md).
    Unauthenticated,
    /// 4403: The origin of the page is not allowed, or a new token belongs to a different user.
    Forbidden,
    /// 4408: The client reads more slowly than messages arrive (docs/glossary.md, "Slow consumer").
    SlowConsumer,
    /// 4429: A limit on connections, messages or memory is exceeded. The reason contains the name of the option.
    LimitExceeded,
    /// A code that this version does not know.
    Other(u16),
}

/// Properties of a close code.
struct Row {
    code: u16,
    meaning: &'static str,
    is_retryable: bool,
    error: Option<ErrorCode>,
}

impl Row {
    /// Returns the row of a code after which the client should reconnect.
    const fn temporary(code: u16, meaning: &'static str) -> Self {
        Self { code, meaning, is_retryable: true, error: None }
    }

    /// Returns the row of a code after which an unchanged client would be rejected again, with the error that the
    /// code reports, if an error code matches it.
    const fn permanent(code: u16, meaning: &'static str, error: Option<ErrorCode>) -> Self {
        Self { code, meaning, is_retryable: false, error }
    }
}

impl CloseCode {
    /// All known codes, in ascending order.
    pub const ALL: [Self; 14] = [
        Self::Normal,
        Self::GoingAway,
        Self::ProtocolError,
        Self::UnsupportedData,
        Self::NoStatus,
        Self::InvalidPayload,
        Self::PolicyViolation,
        Self::MessageTooBig,
        Self::TryAgainLater,
        Self::InvalidRequest,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::SlowConsumer,
        Self::LimitExceeded,
    ];

    const fn row(self) -> Row {
        use ErrorCode::{Forbidden, Unauthorized, ValidationError};
        match self {
            Self::Normal => Row::temporary(1000, "the connection is no longer needed"),
            Self::GoingAway => Row::temporary(1001, "the peer is shutting down"),
            Self::ProtocolError => {
                Row::permanent(1002, "a frame violates the WebSocket protocol", None)
            }
            Self::UnsupportedData => {
                Row::permanent(1003, "the type of a message is not supported", None)
            }
            Self::NoStatus => Row::temporary(1005, "the close frame contains no code"),
            Self::InvalidPayload => Row::permanent(1007, "a text message is not UTF-8", None),
            Self::PolicyViolation => Row::permanent(1008, "a rule of the server is violated", None),
            Self::MessageTooBig => {
                Row::permanent(1009, "a message is too large", Some(ValidationError))
            }
            Self::TryAgainLater => Row::temporary(1013, "the server is temporarily unavailable"),
            Self::InvalidRequest => Row::permanent(
                4400,
                "the subprotocol or too many messages are invalid",
                Some(ValidationError),
            ),
            Self::Unauthenticated => {
                Row::permanent(4401, "the token is missing, invalid or expired", Some(Unauthorized))
            }
            Self::Forbidden => {
                Row::permanent(4403, "the origin or the new token is not allowed", Some(Forbidden))
            }
            Self::SlowConsumer => Row::temporary(4408, "the client reads too slowly"),
            Self::LimitExceeded => Row::temporary(4429, "a limit is exceeded"),
            Self::Other(code) => Row::temporary(code, "unknown"),
        }
    }

    /// Returns the number in the close frame.
    #[must_use]
    pub const fn code(self) -> u16 {
        self.row().code
    }

    /// Returns the number as text; `_other` for an unknown code, so that clients cannot create label values.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Normal => "1000",
            Self::GoingAway => "1001",
            Self::ProtocolError => "1002",
            Self::UnsupportedData => "1003",
            Self::NoStatus => "1005",
            Self::InvalidPayload => "1007",
            Self::PolicyViolation => "1008",
            Self::MessageTooBig => "1009",
            Self::TryAgainLater => "1013",
            Self::InvalidRequest => "4400",
            Self::Unauthenticated => "4401",
            Self::Forbidden => "4403",
            Self::SlowConsumer => "4408",
            Self::LimitExceeded => "4429",
            Self::Other(_) => "_other",
        }
    }

    /// Returns what the code means, such as `a message is too large`.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// Returns whether a client should reconnect, because the same calls may succeed on a new connection. Unknown codes
    /// are retryable.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        self.row().is_retryable
    }

    /// Returns the client's error that the code reports; `None` if the code does not name one.
    #[must_use]
    pub const fn error_code(self) -> Option<ErrorCode> {
        self.row().error
    }
}

impl From<u16> for CloseCode {
    fn from(code: u16) -> Self {
        Self::ALL.into_iter().find(|known| known.code() == code).unwrap_or(Self::Other(code))
    }
}

/// Formats the code as its number.
impl fmt::Display for CloseCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.code().fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_match_the_registry_and_the_protocol() {
        let numbers = CloseCode::ALL.map(CloseCode::code);
        let expected =
            [1000, 1001, 1002, 1003, 1005, 1007, 1008, 1009, 1013, 4400, 4401, 4403, 4408, 4429];
        assert_eq!(numbers, expected);
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from(code.code()), code);
            assert_eq!(code.label(), code.to_string());
        }
    }

    #[test]
    fn unknown_codes_are_kept_and_retryable() {
        let code = CloseCode::from(1011);
        assert_eq!((code, code.to_string()), (CloseCode::Other(1011), "1011".to_owned()));
        assert!(code.is_retryable() && code.error_code().is_none());
    }

    #[test]
    fn only_codes_that_name_an_error_of_the_client_or_a_violation_are_permanent() {
        let permanent: Vec<_> = CloseCode::ALL
            .into_iter()
            .filter(|code| !code.is_retryable())
            .map(|code| (code.code(), code.error_code()))
            .collect();
        let expected = [
            (1002, None),
            (1003, None),
            (1007, None),
            (1008, None),
            (1009, Some(ErrorCode::ValidationError)),
            (4400, Some(ErrorCode::ValidationError)),
            (4401, Some(ErrorCode::Unauthorized)),
            (4403, Some(ErrorCode::Forbidden)),
        ];
        assert_eq!(permanent, expected);
    }
}
