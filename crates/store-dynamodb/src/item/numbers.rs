//! Stored form of the numbers of events and attempts, for `#[serde(with)]`: a DynamoDB number.

/// Position of an event.
pub(super) mod seq {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use streamer_core::Seq;

    pub(crate) fn serialize<S: Serializer>(seq: &Seq, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(seq.as_i64())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(decoder: D) -> Result<Seq, D::Error> {
        let number = i64::deserialize(decoder)?;
        Seq::from_i64(number).map_err(|rule| D::Error::custom(format!("seq: {rule}")))
    }
}

/// Number of an attempt.
pub(super) mod attempt {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use streamer_core::AttemptNumber;

    pub(crate) fn serialize<S: Serializer>(
        attempt: &AttemptNumber,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(attempt.as_u32())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        decoder: D,
    ) -> Result<AttemptNumber, D::Error> {
        let number = i64::deserialize(decoder)?;
        AttemptNumber::from_i64(number).map_err(|rule| D::Error::custom(format!("attempt: {rule}")))
    }
}
