//! Reason why a schema is rejected.

/// Reason why a schema is rejected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SchemaError {
    #[error("is not JSON: {0}")]
    NotJson(String),
    #[error("is not a JSON Schema: {0}")]
    NotASchema(String),
    #[error("$schema {0} is not one of the drafts 2020-12, 2019-09, 7, 6 and 4")]
    UnknownDraft(String),
    #[error("{location:?} has {keyword}, which is not supported")]
    Unsupported { location: String, keyword: String },
    #[error(
        "{location:?} refers to {reference}, which is not '#' or '#/…' of an existing location"
    )]
    Reference { location: String, reference: String },
    #[error("a pattern of {location:?} {rule}")]
    Pattern { location: String, rule: String },
    #[error("has more than {max} subschemas")]
    TooManySubschemas { max: usize },
    #[error(
        "has locations (JSON Pointers) of subschemas and keywords longer than {max} bytes in total: \
         shorten the names of properties, or nest them less"
    )]
    TooLongLocations { max: u64 },
    #[error("{location:?} applies itself to the same value without end")]
    EndlessReference { location: String },
    #[error("{location:?} starts a chain of more than {max} subschemas for the same value")]
    TooLongChain { location: String, max: usize },
    #[error("{location:?} applies too many subschemas to the same value")]
    TooManyAlternatives { location: String },
    #[error("the recursion through {location:?} passes more than {max} subschemas")]
    TooDeepRecursion { location: String, max: usize },
    #[error(
        "may take {steps} steps for one value nested {depth} deep, {max} are allowed: its \
         subschemas refer back to it along several paths"
    )]
    TooExpensive { steps: u64, depth: usize, max: u64 },
}

impl SchemaError {
    pub(crate) fn unsupported(location: &str, keyword: &str) -> Self {
        Self::Unsupported { location: location.to_owned(), keyword: keyword.to_owned() }
    }
}
